// Lanes of a team on one thread of the CPU: each on a stack of its own, until it waits for the others.
#pragma once

#include <ucontext.h>

#include <cstring>
#include <memory>

#include "common/platform.h"

namespace gi {

class EmulatedLanes {
 public:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int kMost = 1;  // the sanitizer follows one stack
#else
  static constexpr int kMost = 4;
#endif
  static constexpr int kBytes = 1024;  // most that a lane tells the others at a time

  // Runs work(lane) for all lanes; work may call tell().
  template <class Work> static void run(int lanes, const Work& work) {
    if (lanes == 1) return work(0);
    own().run_all(lanes, [](const void* w, int lane) { (*static_cast<const Work*>(w))(lane); }, &work);
  }

  // Hands `bytes` of this lane to the others and waits for theirs; heard(l) is what lane l has told.
  struct Heard {
    const unsigned char (*memory)[kBytes];
    template <class A> A at(int lane, int n) const {
      A value;
      std::memcpy(&value, memory[lane] + n * sizeof(A), sizeof value);
      return value;
    }
  };
  static Heard tell(const void* what, size_t bytes) {
    EmulatedLanes& all = own();
    const int lane = all.current_, turn = all.turn_[lane]++ % 2;  // others may still read the last one
    std::memcpy(all.told_[turn][lane], what, bytes);
    swapcontext(&all.lane_[lane], &all.main_);
    return {all.told_[turn]};
  }

 private:
  using Function = void (*)(const void*, int);
  static constexpr size_t kStack = size_t(1) << 18;

  int current_ = 0, turn_[kMost];
  bool done_[kMost];
  Function function_;
  const void* work_;
  ucontext_t main_, lane_[kMost];
  alignas(16) unsigned char told_[2][kMost][kBytes];
  std::unique_ptr<char[]> stack_{new char[kMost * kStack]};

  static EmulatedLanes& own() {
    static thread_local const std::unique_ptr<EmulatedLanes> lanes{new EmulatedLanes};
    return *lanes;
  }
  static void enter() {
    EmulatedLanes& all = own();
    const int lane = all.current_;
    all.function_(all.work_, lane);
    all.done_[lane] = true;
  }

  void prepare(int lane) {
    turn_[lane] = 0;
    done_[lane] = false;
    getcontext(&lane_[lane]);
    lane_[lane].uc_stack.ss_sp = stack_.get() + lane * kStack;
    lane_[lane].uc_stack.ss_size = kStack;
    lane_[lane].uc_link = &main_;
    makecontext(&lane_[lane], enter, 0);
  }

  void run_all(int lanes, Function function, const void* work) {
    function_ = function;
    work_ = work;
    for (int l = 0; l < lanes; ++l) prepare(l);
    for (bool more = true; more;) {
      more = false;
      for (current_ = lanes - 1; current_ >= 0; --current_) {
        if (done_[current_]) continue;
        swapcontext(&main_, &lane_[current_]);
        more = more || !done_[current_];
      }
    }
  }
};

}  // namespace gi
