// GNUstep's headers ask for it under -fblocks; Debian's libblocksruntime-dev names it otherwise.
#include <Block.h>
