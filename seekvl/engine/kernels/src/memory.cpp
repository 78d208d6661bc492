#include "memory.h"

#include <vector>

namespace seekvl {

int64_t size_of(Dtype dtype) { return dtype == F32 ? 4 : 2; }

const char* shifted(const void* from, int64_t count, Dtype dtype) {
    return static_cast<const char*>(from) + count * size_of(dtype);
}

Scratch::Scratch(int64_t count, Use use) {
    static thread_local std::vector<float> all[kUses];
    std::vector<float>& kept = all[use];
    if (static_cast<int64_t>(kept.size()) < count + kLine) {
        kept = std::vector<float>();  // nothing in it is worth a copy, nor both of them the room
        kept.resize(count + kLine);
    }
    const auto address = reinterpret_cast<uintptr_t>(kept.data());
    next_ = kept.data() + (kLine - address / sizeof(float) % kLine) % kLine;
}

}  // namespace seekvl
