// How threads divide units of work that lie one after another in memory.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>

namespace prunus {

// Each thread begins with neighbours of its own and takes them in order: the hardware then sees what it will read next.
// One that has none left takes the second half of what the richest has, so that all end together.
class Shares {
 public:
  Shares(int64_t units, int threads) : threads_(threads), shares_(new Share[threads]) {
    for (int i = 0; i < threads; ++i) shares_[i].units = units_of(units * i / threads, units * (i + 1) / threads);
  }

  // Each thread joins once and takes units by the number that it got.
  int join() { return joined_.fetch_add(1); }

  bool take(int thread, int64_t& unit) {
    std::atomic<uint64_t>& own = shares_[thread].units;
    do {
      for (uint64_t units = own; left(units);)
        if (own.compare_exchange_weak(units, units_of(first(units) + 1, end(units)))) {
          unit = first(units);
          return true;
        }
    } while (steal(own));
    return false;
  }

 private:
  struct alignas(64) Share {
    std::atomic<uint64_t> units;  // the first that is left, and the end
  };
  static uint64_t units_of(int64_t first, int64_t end) { return static_cast<uint64_t>(first) << 32 | end; }
  static int64_t first(uint64_t units) { return units >> 32; }
  static int64_t end(uint64_t units) { return units & 0xffffffff; }
  static int64_t left(uint64_t units) { return end(units) - first(units); }

  // False where nobody has any left.
  bool steal(std::atomic<uint64_t>& own) {
    for (;;) {
      std::atomic<uint64_t>* richest = &own;
      uint64_t units = own;
      for (int i = 0; i < threads_; ++i) {
        const uint64_t theirs = shares_[i].units;
        if (left(theirs) > left(units)) richest = &shares_[i].units, units = theirs;
      }
      if (!left(units)) return false;
      const int64_t middle = first(units) + left(units) / 2;
      if (!richest->compare_exchange_strong(units, units_of(first(units), middle))) continue;
      own = units_of(middle, end(units));
      return true;
    }
  }

  const int threads_;
  const std::unique_ptr<Share[]> shares_;
  std::atomic<int> joined_{0};
};

}  // namespace prunus
