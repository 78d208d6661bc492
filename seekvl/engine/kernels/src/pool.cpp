#include "pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace seekvl {
namespace {

constexpr auto kSpin = std::chrono::microseconds(100);  // longer than Python needs from one product to the next

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// The state of the job at hand, in one word so that joining it is one exchange:
//
//     number of the job, 32 bits | how many helpers may still join, 16 bits | how many are inside, 16 bits
constexpr uint64_t kInside = 1, kRoom = 1 << 16, kNumber = uint64_t{1} << 32;

inline uint64_t inside(uint64_t state) { return state & 0xffff; }
inline uint64_t room(uint64_t state) { return state >> 16 & 0xffff; }
inline uint64_t number(uint64_t state) { return state >> 32; }

class Pool {
  public:
    void run(int threads, int64_t total, int64_t piece, Work work, const void* job) {
        std::unique_lock<std::mutex> ours(busy_, std::try_to_lock);
        if (!ours) return work(job, 0, total);
        grow(threads - 1);
        work_ = work, job_ = job, total_ = total, piece_ = piece;
        next_.store(0, std::memory_order_relaxed);
        const uint64_t helpers = std::min<uint64_t>(workers_.size(), threads - 1);
        const uint64_t state = (number(state_.load()) + 1) * kNumber + helpers * kRoom;
        state_.store(state);
        if (sleepers_.load() > 0) wake();
        take_pieces();
        state_.fetch_and(~(uint64_t{0xffff} * kRoom));  // who comes now is too late
        for (int turn = 0; inside(state_.load(std::memory_order_acquire)) > 0; ++turn)
            turn < 1000 ? pause() : std::this_thread::yield();
    }

    void release() {
        std::lock_guard<std::mutex> ours(busy_);
        stop_.store(true);
        wake();
        for (std::thread& worker : workers_) worker.join();
        workers_.clear();
        stop_.store(false);
    }

    int workers() {
        std::lock_guard<std::mutex> ours(busy_);
        return static_cast<int>(workers_.size());
    }

  private:
    void grow(int count) {
        if (static_cast<int>(workers_.size()) >= count) return;
        sigset_t all, before;  // signals are for the threads of the program
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            while (static_cast<int>(workers_.size()) < count) workers_.emplace_back([this] { serve(); });
        } catch (const std::system_error&) {
            // The system gives no more threads; those there are do the work.
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    void serve() {
        uint64_t done = 0;
        while (await(done)) {
            uint64_t state = state_.load();
            while (room(state) > 0 && number(state) != done) {
                if (!state_.compare_exchange_weak(state, state - kRoom + kInside)) continue;
                done = number(state);
                take_pieces();
                state_.fetch_sub(kInside, std::memory_order_release);
                break;
            }
        }
    }

    // Wait for a job other than `done`, awake for a while and then asleep; false when the threads shall end.
    bool await(uint64_t done) {
        const auto ready = [&] {
            const uint64_t state = state_.load();
            return stop_.load() || (room(state) > 0 && number(state) != done);
        };
        const auto until = std::chrono::steady_clock::now() + kSpin;
        while (std::chrono::steady_clock::now() < until)
            for (int turn = 0; turn < 32; ++turn) {
                if (ready()) return !stop_.load();
                pause();
            }
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, ready);
        sleepers_.fetch_sub(1);
        return !stop_.load();
    }

    void wake() {
        { std::lock_guard<std::mutex> lock(sleep_); }  // who counted himself asleep is now really waiting
        wake_.notify_all();
    }

    void take_pieces() {
        for (;;) {
            const int64_t begin = next_.fetch_add(piece_, std::memory_order_relaxed);
            if (begin >= total_) return;
            work_(job_, begin, std::min(begin + piece_, total_));
        }
    }

    std::mutex busy_;  // held by the thread whose job is worked on
    std::mutex sleep_;
    std::condition_variable wake_;
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
    std::vector<std::thread> workers_;
    Work work_ = nullptr;
    const void* job_ = nullptr;
    int64_t total_ = 0, piece_ = 1;
    alignas(64) std::atomic<uint64_t> state_{0};
    alignas(64) std::atomic<int64_t> next_{0};
};

// Never destroyed: at the end of the process a thread of the program may still be computing.
std::atomic<Pool*> current{nullptr};

// A forked child has none of the threads, and locks that may never open again: it starts with a new pool.
void forget_after_fork() { current.store(nullptr); }

Pool& pool() {
    Pool* found = current.load();
    if (found) return *found;
    static const int registered = pthread_atfork(nullptr, nullptr, forget_after_fork);
    static_cast<void>(registered);
    Pool* made = new Pool;
    if (current.compare_exchange_strong(found, made)) return *made;
    delete made;
    return *found;
}

}  // namespace

void run(int threads, int64_t total, int64_t piece, Work work, const void* job) {
    if (threads <= 1 || total <= piece) return work(job, 0, total);
    pool().run(threads, total, piece, work, job);
}

void release() { pool().release(); }

int workers() { return pool().workers(); }

}  // namespace seekvl
