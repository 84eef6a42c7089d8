// The exceptions that native code throws; bindings turn each into the class of flashmoe.errors of
// the same name.
#pragma once

#include <stdexcept>

namespace flashmoe {

// Stored weights are not what a model can be computed with (not finite, say).
struct CheckpointError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A file could not be read as its metadata promised: names the file, the offset and what was found.
struct ReadError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The system does not grant the memory; nothing has changed.
struct OutOfMemoryError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A GPU is absent, refused a kernel or could not finish its work.
struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The object is closed, or this thread is in the middle of another call to it.
struct StateError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Who asked for the work does not want it any more.
struct Stopped : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace flashmoe
