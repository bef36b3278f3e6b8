// The plain C interface that Python calls; runtime/native.py says what the arguments are.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "block.h"
#include "jobs.h"

namespace prunus {
namespace {

// Strips of one matrix as rows of plain values.
struct Expansion {
  const Matrix& matrix;
  int64_t first, strips;
  void* out;
  Type type;
  const Kernels& code;
  std::atomic<int64_t> next{0};

  void run() {
    for (int64_t strip; (strip = next.fetch_add(1)) < strips;) {
      const int64_t rows = std::min<int64_t>(kStrip, matrix.rows - (first + strip) * kStrip);
      const int64_t before = strip * kStrip * matrix.columns * (type == kFloat32 ? sizeof(float) : sizeof(uint16_t));
      code.expand(matrix, first + strip, static_cast<int>(rows), type, static_cast<char*>(out) + before);
    }
  }
};

// Reads memory and nothing else: the bandwidth that kernels can reach at best.
struct Reading {
  const uint64_t* words;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::atomic<uint64_t> sum{0};

  void run() {
    constexpr int64_t kAtOnce = 1 << 15;
    uint64_t total = 0;
    for (int64_t first; (first = next.fetch_add(kAtOnce)) < count;)
      for (int64_t i = first; i < std::min(first + kAtOnce, count); ++i) total += words[i];
    sum += total;
  }
};

}  // namespace
}  // namespace prunus

using namespace prunus;

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int32_t prunus_interface_version() { return 3; }

EXPORTED const char* prunus_level() { return kernels().name; }

EXPORTED const char* prunus_level_named(int32_t index) { return level_named(index); }

// 0, or -1 for a level that this processor has not.
EXPORTED int32_t prunus_use_level(const char* name) { return use_level(name) ? 0 : -1; }

EXPORTED void prunus_use_openmp(void* gomp_parallel) { use_openmp(reinterpret_cast<GompParallel>(gomp_parallel)); }

EXPORTED void prunus_multiply(const Matrix* matrices, int32_t count, const void* x, int32_t type, int64_t batch,
                              void* const* out, int32_t threads) {
  multiply(kernels(), matrices, count, {x, static_cast<Type>(type), batch, matrices[0].columns}, out, threads);
}

EXPORTED void prunus_expand(const Matrix* matrix, int64_t first_strip, int64_t strips, void* out, int32_t type,
                            int32_t threads) {
  Expansion expansion{*matrix, first_strip, strips, out, static_cast<Type>(type), kernels()};
  in_parallel(expansion, threads);
}

EXPORTED void prunus_attend(const Attention* attention, int32_t threads) {
  Attending attending{*attention, kernels()};
  in_parallel(attending, threads);
}

EXPORTED void prunus_project(const Projection* projection, int32_t threads) { project(kernels(), *projection, threads); }

EXPORTED void prunus_complete(const Completion* completion, int32_t threads) {
  complete(kernels(), *completion, threads);
}

EXPORTED uint64_t prunus_read(const void* memory, int64_t bytes, int32_t threads) {
  Reading reading{static_cast<const uint64_t*>(memory), bytes / 8};
  in_parallel(reading, threads);
  return reading.sum;
}

// Asks for memory in pages of 2 MiB instead of 4 KiB, now (Linux 6.1 and later): weights are read once for each token,
// and looking up where their pages lie takes a good part of that. Whatever cannot be had stays as it is.
EXPORTED void prunus_use_huge_pages(const void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  constexpr int kCollapse = 25;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = begin & ~(kPage - 1), last = (begin + bytes + kPage - 1) & ~(kPage - 1);
  for (uintptr_t page = first; page < last; page += kPage) madvise(reinterpret_cast<void*>(page), kPage, kCollapse);
#else
  (void)memory, (void)bytes;
#endif
}
