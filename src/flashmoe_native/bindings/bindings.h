// One register function a file; module.cpp calls them.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "core/process.h"
#include "core/spec.h"
#include "model/config.h"

namespace flashmoe {

// Lets other Python threads run while native code does; see core/process.h.
class Unlocked {
  const Call call_;
  const nanobind::gil_scoped_release release_;
};

void bind_checkpoint(nanobind::module_& m);
void bind_engine(nanobind::module_& m);
void bind_quantize(nanobind::module_& m);
// `_native.ops`: every Backend operation on numpy arrays, for tests that compare them with numpy.
void bind_ops(nanobind::module_& m);
// `_native.GpuPlans`: what a GPU backend launches for an operation, for tests that execute it.
void bind_plans(nanobind::module_& m);

// Throws ValueError where that does not hold.
void require(bool holds, const std::string& message);
// From Python's ModelConfig as a dict, with experts_per_token beside its fields.
ModelConfig to_config(const nanobind::dict& values, const CheckpointSpec& checkpoint);

}  // namespace flashmoe
