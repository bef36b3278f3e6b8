// One pool of threads: torch's own OpenMP where it is given to us, so that two pools never wait for each other's
// cores; else threads of our own.
#pragma once

namespace prunus {

using Work = void (*)(void*);
using GompParallel = void (*)(Work, void*, unsigned threads, unsigned flags);

void use_openmp(GompParallel parallel);

// Runs `work` on up to `threads` threads at once, this one among them, and returns when all have. `work` takes its
// share from what it finds, so that it does not matter how many came.
void parallel(int threads, Work work, void* argument);

}  // namespace prunus
