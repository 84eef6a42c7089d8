// What macOS 15 added to Metal, declared here because older SDKs have it not. Whether an object has
// it is asked at run time.
#pragma once

#import <Metal/Metal.h>

@protocol NewerMTLResidencySet <NSObject>
- (void)addAllocation:(id)allocation;
- (void)removeAllocation:(id)allocation;
- (void)commit;
- (void)requestResidency;
@end

@protocol NewerMTLDevice <NSObject>
- (id)newResidencySetWithDescriptor:(id)descriptor error:(NSError**)error;
@end

@protocol NewerMTLCommandQueue <NSObject>
- (void)addResidencySet:(id)set;
@end

@protocol NewerMTLCompileOptions <NSObject>
- (void)setMathMode:(NSInteger)mode;
- (void)setMathFloatingPointFunctions:(NSInteger)functions;
@end
