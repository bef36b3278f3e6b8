// The plain C interface that Python calls; runtime/native.py says what the arguments are.
#include <algorithm>
#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "inputs.h"
#include "matrix.h"
#include "numbers.h"
#include "threads.h"

namespace prunus {
namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_full() {
  return has_avx512() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

// The tiles of AMX belong to a process that has asked the system for them.
bool has_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!has_avx512_full() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const unsigned wanted = 1u << 22 | 1u << 24;  // bfloat16, tiles
  constexpr long kAskForState = 0x1023, kTileData = 18;
  return (d & wanted) == wanted && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}
#endif

#if defined(__aarch64__)
// Products of bytes: the system says so on Linux; every processor of Apple's computers has them.
bool has_dot() {
#if defined(__linux__)
  constexpr unsigned long kAsimdDot = 1ul << 20;
  return getauxval(AT_HWCAP) & kAsimdDot;
#elif defined(__APPLE__)
  return true;
#else
  return false;
#endif
}
#endif

bool always() { return true; }

struct Level {
  const Kernels* kernels;
  bool (*supported)();
};

// Best first.
const Level levels[] = {
#if defined(__x86_64__)
    {&amx_kernels, has_amx},
    {&avx512_full_kernels, has_avx512_full},
    {&avx512_kernels, has_avx512},
    {&avx2_kernels, has_avx2},
#elif defined(__aarch64__)
    {&neon_dot_kernels, has_dot},
    {&neon_kernels, always},
#endif
    {&portable_kernels, always},
};

const Kernels* best() {
  for (const Level& level : levels)
    if (level.supported()) return level.kernels;
  return &portable_kernels;
}

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& kernels() {
  const Kernels* now = chosen.load();
  if (!now) chosen.store(now = best());
  return *now;
}

void store(void* to, int64_t index, Type type, float value) {
  if (type == kFloat32)
    static_cast<float*>(to)[index] = value;
  else
    static_cast<uint16_t*>(to)[index] = narrowed(value);
}

// A product of several matrices with the same inputs. Threads take strips until none is left; a strip is always
// computed by one thread in one order, so the result does not depend on how many there are.
struct Product {
  const Matrix* matrices;
  int count;
  Given given;
  void* const* out;
  const Kernels& code;
  Inputs inputs;
  int64_t strips, at_once;
  std::atomic<int64_t> next{0};

  void run() {
    for (int64_t first; (first = next.fetch_add(at_once)) < strips;)
      for (int64_t strip = first; strip < std::min(first + at_once, strips); ++strip) one(strip);
  }

  void one(int64_t strip) {
    int which = 0;
    while (strip >= strips_of(matrices[which])) strip -= strips_of(matrices[which++]);
    const Matrix& m = matrices[which];
    float sums[kMaxBatch][kStrip];
    for (int64_t b = 0; b < given.batch; b += kMaxBatch) {
      const int batch = static_cast<int>(std::min<int64_t>(kMaxBatch, given.batch - b));
      code.product(m, strip, from(inputs, b), batch, sums);
      const int rows = static_cast<int>(std::min<int64_t>(kStrip, m.rows - strip * kStrip));
      for (int k = 0; k < batch; ++k)
        for (int r = 0; r < rows; ++r) {
          const int64_t row = strip * kStrip + r;
          store(out[which], (b + k) * m.rows + row, given.type, sums[k][r] * (m.scale ? m.scale[row] : 1.0f));
        }
    }
  }
};

// Heads of one group at a time, a few of them.
struct Attending {
  const Attention& attention;
  const Kernels& code;
  std::atomic<int64_t> next{0};

  void run() {
    const int64_t per_group = attention.heads / attention.groups, parts = (per_group + kHeads - 1) / kHeads;
    const int64_t all = attention.batch * attention.groups * parts;
    for (int64_t one; (one = next.fetch_add(1)) < all;) {
      const int64_t first = one % parts * kHeads, group = one / parts % attention.groups;
      const int count = static_cast<int>(std::min<int64_t>(kHeads, per_group - first));
      code.attend(attention, one / parts / attention.groups, group * per_group + first, count);
    }
  }
};

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

template <class Job>
void in_parallel(Job& job, int threads) {
  parallel(threads, [](void* argument) { static_cast<Job*>(argument)->run(); }, &job);
}

}  // namespace
}  // namespace prunus

using namespace prunus;

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int32_t prunus_interface_version() { return 2; }

EXPORTED const char* prunus_level() { return kernels().name; }

// The names of the levels that this processor has, best first; null behind the last.
EXPORTED const char* prunus_level_named(int32_t index) {
  for (const Level& level : levels)
    if (level.supported() && index-- == 0) return level.kernels->name;
  return nullptr;
}

// 0, or -1 for a level that this processor has not.
EXPORTED int32_t prunus_use_level(const char* name) {
  for (const Level& level : levels)
    if (level.supported() && !std::strcmp(level.kernels->name, name)) {
      chosen.store(level.kernels);
      return 0;
    }
  return -1;
}

EXPORTED void prunus_use_openmp(void* gomp_parallel) { use_openmp(reinterpret_cast<GompParallel>(gomp_parallel)); }

EXPORTED void prunus_multiply(const Matrix* matrices, int32_t count, const void* x, int32_t type, int64_t batch,
                              void* const* out, int32_t threads) {
  bool for_bfloat16 = false, for_int8 = false;
  int64_t strips = 0;
  for (int i = 0; i < count; ++i) {
    (matrices[i].type == kInt8 ? for_int8 : for_bfloat16) = true;
    strips += strips_of(matrices[i]);
  }
  const Given given{x, static_cast<Type>(type), batch, matrices[0].columns};
  const PreparedInputs prepared(given, for_bfloat16, for_int8, kernels().has_bfloat16);
  const int64_t at_once = std::max<int64_t>(1, strips / (threads * 16));
  Product product{matrices, count, given, out, kernels(), prepared.inputs(), strips, at_once};
  in_parallel(product, threads);
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
