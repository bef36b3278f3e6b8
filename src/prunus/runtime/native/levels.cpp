#include "levels.h"

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

}  // namespace

const Kernels& kernels() {
  const Kernels* now = chosen.load();
  if (!now) chosen.store(now = best());
  return *now;
}

const char* level_named(int index) {
  for (const Level& level : levels)
    if (level.supported() && index-- == 0) return level.kernels->name;
  return nullptr;
}

bool use_level(const char* name) {
  for (const Level& level : levels)
    if (level.supported() && !std::strcmp(level.kernels->name, name)) {
      chosen.store(level.kernels);
      return true;
    }
  return false;
}

}  // namespace prunus
