// x86 with AVX-512 (Skylake-X, Zen 4, and later).
#if defined(__x86_64__)

#include "attend_lanes.h"
#include "avx512.h"
#include "tower_lanes.h"

namespace seekvl {

const Level avx512 = level_of<Avx512>();
const Many avx512_many = many_of<Avx512, Avx512Lanes>();
const Gradients avx512_gradients = gradients_of<Avx512, Avx512Lanes>();
const AttendTile avx512_attend = attend<Avx512, Avx512Lanes>;
const TowerLevel avx512_tower = tower_of<Avx512, Avx512Lanes>();

}  // namespace seekvl

#endif
