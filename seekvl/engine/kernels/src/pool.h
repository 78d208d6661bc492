// Threads that stay: a product of a decoding step is done in the time it takes to start one.
#pragma once

#include <cstdint>

namespace seekvl {

using Work = void (*)(const void* job, int64_t begin, int64_t end);

// Call work(job, begin, end) for pieces that make up 0..total, on this thread and at most `threads` - 1 others.
//
// Pieces are handed out one at a time, and nobody waits for a thread that has not begun: a core that is busy with
// something else costs its share of the speed and not more. Where the threads already serve another caller, this
// one works alone.
void run(int threads, int64_t total, int64_t piece, Work work, const void* job);

// End the threads; they come back when needed.
void release();

int workers();

}  // namespace seekvl
