// One register function a file; module.cpp calls them.
#pragma once

#include <nanobind/nanobind.h>

namespace flashmoe {

void bind_engine(nanobind::module_& m);
void bind_quantize(nanobind::module_& m);
// `_native.ops`: every Backend operation on numpy arrays, for tests that compare them with numpy.
void bind_ops(nanobind::module_& m);
// `_native.GpuPlans`: what a GPU backend launches for an operation, for tests that execute it.
void bind_plans(nanobind::module_& m);

}  // namespace flashmoe
