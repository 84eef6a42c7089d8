// A reference to an Objective-C object, given up by the destructor. Written out because the same
// files are compiled without ARC, which the runtime that tests run on does not have.
#pragma once

#import <Foundation/Foundation.h>

#include <utility>

namespace flashmoe {

template <class Object>
class Owned {
 public:
  Owned() = default;
  // Takes over the reference that a method named new…, alloc or copy gave.
  static Owned adopt(Object object) { return Owned(object); }
  // Adds a reference to an object that the autorelease pool would else free.
  static Owned share(Object object) { return Owned([object retain]); }
  Owned(Owned&& other) noexcept : object_(std::exchange(other.object_, nil)) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Owned() { [object_ release]; }

  Object get() const { return object_; }
  explicit operator bool() const { return object_ != nil; }
  void reset() { [std::exchange(object_, nil) release]; }

 private:
  explicit Owned(Object object) : object_(object) {}

  Object object_ = nil;
};

// Frees what Objective-C calls autorelease while it is in scope, also where C++ throws out of it.
class Pool {
 public:
  Pool() : pool_(Owned<NSAutoreleasePool*>::adopt([[NSAutoreleasePool alloc] init])) {}

 private:
  Owned<NSAutoreleasePool*> pool_;
};

}  // namespace flashmoe
