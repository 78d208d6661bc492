// Any 64-bit ARM.
#if defined(__aarch64__)

#include "packed_neon.h"

namespace seekvl {

const PackedLevel packed_neon = packed_level_of<Neon>();

}  // namespace seekvl

#endif
