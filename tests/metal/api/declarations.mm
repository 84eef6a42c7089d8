// Everything in tests/metal/include/Metal/Metal.h and the host's newer.h, for its compiled tables:
// see test_host.py.
#import <Metal/Metal.h>

#import "backend/metal/newer.h"

Protocol* const protocols[] = {
    @protocol(MTLDevice),
    @protocol(MTLCommandQueue),
    @protocol(MTLCommandBuffer),
    @protocol(MTLComputeCommandEncoder),
    @protocol(MTLBuffer),
    @protocol(MTLLibrary),
    @protocol(MTLFunction),
    @protocol(MTLComputePipelineState),
    @protocol(MTLFence),
    @protocol(NewerMTLDevice),
    @protocol(NewerMTLCommandQueue),
    @protocol(NewerMTLResidencySet),
    @protocol(NewerMTLCompileOptions),
};

@implementation MTLCompileOptions
- (void)setFastMathEnabled:(BOOL)enabled {
}
- (void)setLanguageVersion:(MTLLanguageVersion)version {
}
@end

@implementation MTLFunctionConstantValues
- (void)setConstantValue:(const void*)value type:(MTLDataType)type atIndex:(NSUInteger)index {
}
@end
