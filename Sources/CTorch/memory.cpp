// Large buffers on the CPU are kept when they are freed: the activations of wide layers come and go at every operation,
// and fresh pages cost their faults and their zeros each time.
#include "memory.h"

#include <c10/core/CPUAllocator.h>

#include <list>
#include <mutex>
#include <unordered_map>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace chunkgrpo {
#if defined(__linux__)
namespace {

constexpr size_t large = 32 << 20;  // below, malloc keeps what it gets
constexpr size_t page = 2 << 20;    // huge pages: few faults

/* Hands out large blocks as pages of the system and keeps them in order of their freeing, up to a limit; everything else
   is left to libtorch's own allocator. */
class KeepingAllocator final : public c10::Allocator {
  struct Block {
    void *memory;
    size_t size;
  };
  std::mutex mutex;
  std::unordered_map<void *, size_t> used;
  std::list<Block> kept;  // the longest unused first
  size_t held = 0;
  const size_t limit = std::min(size_t(1) << 30, size_t(sysconf(_SC_PHYS_PAGES)) / 16 * size_t(sysconf(_SC_PAGESIZE)));

  void *take(size_t bytes) {
    const size_t size = (bytes + page - 1) / page * page;
    {
      const std::lock_guard lock(mutex);
      // The smallest that fits and wastes no more than an eighth.
      auto best = kept.end();
      for (auto i = kept.begin(); i != kept.end(); ++i)
        if (i->size >= size && i->size <= size + size / 8 && (best == kept.end() || i->size < best->size)) best = i;
      if (best != kept.end()) {
        void *memory = best->memory;
        held -= best->size;
        used[memory] = best->size;
        kept.erase(best);
        return memory;
      }
    }
    void *memory = map(size);
    if (!memory) {
      drop(0);
      memory = map(size);
    }
    TORCH_CHECK_WITH(OutOfMemoryError, memory, "not enough memory: ", bytes, " bytes were asked for");
    const std::lock_guard lock(mutex);
    used[memory] = size;
    return memory;
  }
  static void *map(size_t size) {
    void *memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    madvise(memory, size, MADV_HUGEPAGE);
    return memory;
  }
  /* Its size; 0 if it is not ours. */
  size_t forget(void *memory) {
    const std::lock_guard lock(mutex);
    const auto found = used.find(memory);
    const size_t size = found == used.end() ? 0 : found->second;
    if (size) used.erase(found);
    return size;
  }
  void keep(void *memory, size_t size) {
    {
      const std::lock_guard lock(mutex);
      kept.push_back({memory, size});
      held += size;
    }
    drop(limit);
  }
  static void release(void *memory) {
    const size_t size = instance()->forget(memory);
    if (size == 0) return c10::GetDefaultCPUAllocator()->raw_deleter()(memory);
    // Reported before another thread can have it.
    c10::profiledCPUMemoryReporter().Delete(memory);
    instance()->keep(memory, size);
  }

 public:
  static KeepingAllocator *instance() {
    static KeepingAllocator *const it = new KeepingAllocator;  // lives as long as any buffer may
    return it;
  }
  /* Gives the longest unused back until no more than `most` bytes are kept. */
  void drop(size_t most) {
    const std::lock_guard lock(mutex);
    while (held > most) {
      munmap(kept.front().memory, kept.front().size);
      held -= kept.front().size;
      kept.pop_front();
    }
  }
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < large) return c10::GetDefaultCPUAllocator()->allocate(bytes);
    void *memory = take(bytes);
    c10::profiledCPUMemoryReporter().New(memory, bytes);
    return {memory, memory, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void *to, const void *from, size_t count) const override { default_copy_data(to, from, count); }
};

}  // namespace

void keep_large_buffers() { c10::SetCPUAllocator(KeepingAllocator::instance(), 1); }
void release_kept_buffers() { KeepingAllocator::instance()->drop(0); }
#else
void keep_large_buffers() {}
void release_kept_buffers() {}
#endif
}  // namespace chunkgrpo
