// Everything in tests/metal/include/Metal/Metal.h, for its compiled tables: see test_metal_host.py.
#import <Metal/Metal.h>

Protocol* const protocols[] = {
    @protocol(MTLDevice),        @protocol(MTLCommandQueue),
    @protocol(MTLCommandBuffer), @protocol(MTLComputeCommandEncoder),
    @protocol(MTLBuffer),        @protocol(MTLLibrary),
    @protocol(MTLFunction),      @protocol(MTLComputePipelineState),
};

@implementation MTLCompileOptions
- (void)setFastMathEnabled:(BOOL)enabled {
}
@end

@implementation MTLFunctionConstantValues
- (void)setConstantValue:(const void*)value type:(MTLDataType)type atIndex:(NSUInteger)index {
}
@end
