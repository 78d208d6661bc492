// 64-bit ARM with products of four bytes (dotprod: Cortex-A76, Neoverse N1, Apple M1, and later).
#if defined(__aarch64__)

#include "packed_neon.h"

namespace seekvl {

const PackedLevel packed_dotprod = packed_level_of<Neon>();

}  // namespace seekvl

#endif
