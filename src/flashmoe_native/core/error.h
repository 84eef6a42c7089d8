// The exceptions that native code throws; bindings turn each into the Python class of the same name.
#pragma once

#include <stdexcept>

namespace flashmoe {

// A file could not be read as its metadata promised: names the file, the offset and what was found.
struct ReadError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The object was closed or is in use by another thread.
struct StateError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace flashmoe
