// The part of Apple's Foundation that flashmoe uses, for type checks with ziglang, which has the
// other headers of macOS. The simulator uses GNUstep's Foundation instead.
#pragma once

#include <objc/NSObjCRuntime.h>
#include <objc/NSObject.h>
#include <objc/objc.h>

#include <cstddef>
#include <cstdint>

#define NS_ENUM(type, name) \
  enum name : type name;    \
  enum name : type
#define NS_OPTIONS(type, name) \
  enum name : type name;       \
  enum name : type

@interface NSString : NSObject
+ (instancetype)stringWithUTF8String:(const char*)text;
@property(readonly) const char* UTF8String;
@end

@interface NSError : NSObject
@property(readonly, copy) NSString* localizedDescription;
@property(readonly) NSInteger code;
@end

extern "C" Class NSClassFromString(NSString* name);

@interface NSAutoreleasePool : NSObject
@end
