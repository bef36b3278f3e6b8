#include "threads.h"

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace prunus {
namespace {

GompParallel openmp = nullptr;

class Pool {
 public:
  ~Pool() {
    {
      std::lock_guard lock(state_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  // A pool that is busy for another caller is not waited for: this thread then does all of it.
  void run(int threads, Work work, void* argument) {
    std::unique_lock caller(one_caller_, std::try_to_lock);
    if (!caller || threads < 2) return work(argument);
    {
      std::lock_guard lock(state_);
      while (static_cast<int>(threads_.size()) < threads - 1)
        threads_.emplace_back([this, index = static_cast<int>(threads_.size())] { serve(index); });
      work_ = work;
      argument_ = argument;
      wanted_ = threads - 1;
      running_ = wanted_;
      ++round_;
    }
    wake_.notify_all();
    work(argument);
    std::unique_lock lock(state_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void serve(int index) {
    unsigned long seen = 0;
    std::unique_lock lock(state_);
    for (;;) {
      wake_.wait(lock, [&] { return stopping_ || (round_ != seen && index < wanted_); });
      if (stopping_) return;
      seen = round_;
      const Work work = work_;
      void* const argument = argument_;
      lock.unlock();
      work(argument);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex one_caller_, state_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  Work work_ = nullptr;
  void* argument_ = nullptr;
  int wanted_ = 0, running_ = 0;
  unsigned long round_ = 0;
  bool stopping_ = false;
};

}  // namespace

void use_openmp(GompParallel parallel) { openmp = parallel; }

void parallel(int threads, Work work, void* argument) {
  if (threads < 2) return work(argument);
  if (openmp) return openmp(work, argument, static_cast<unsigned>(threads), 0);
  static Pool pool;
  pool.run(threads, work, argument);
}

}  // namespace prunus
