// Where a CPU's tensors come to lie while a model is trained: one reserved range of addresses, first fit, holes joined.
//
// Every block is taken from the lowest hole that it fits in, cut to a multiple of 64 bytes, and nothing lies between blocks, so
// that what one leaves is taken by the next of its size. glibc's malloc can't do that before 2.38: of a block whose address 64
// must divide it cuts the ends off. Pages of freed blocks are kept, for on a CPU taking them anew is what costs time.
//
// Once registered it stays registered, for a pointer may be freed through torch's allocator of that moment; while it is shut,
// and for small blocks, memory is the C library's.

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

constexpr size_t GRAIN = 64;  // what torch asks an address to be a multiple of

class Range final : public c10::Allocator {
 public:
  // The range is as large as the machine's memory: what does not fit is the C library's to refuse.
  bool reserve() {
    if (start_ != nullptr) return true;
    page_ = sysconf(_SC_PAGESIZE);
    size_ = size_t(sysconf(_SC_PHYS_PAGES)) * page_;
    void* found = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return false;
    start_ = static_cast<char*>(found);
    // A process that is forked while a thread holds the lock would wait for it for ever.
    pthread_atfork([] { range().lock_.lock(); }, [] { range().lock_.unlock(); }, [] { range().lock_.unlock(); });
    c10::SetCPUAllocator(this, 1);
    return true;
  }

  void open(size_t smallest) { smallest_ = smallest; }

  // New blocks are the C library's from here on, and pages that nothing lies on go back to the system.
  void shut() {
    smallest_ = SIZE_MAX;
    std::lock_guard<std::mutex> guard(lock_);
    if (start_ == nullptr) return;
    for (const auto& [place, size] : holes_) give_back(place, place + size);
    give_back(top_, highest_);
    highest_ = top_;
  }

  void state(int64_t* live, int64_t* highest, int64_t* blocks) {
    std::lock_guard<std::mutex> guard(lock_);
    *live = live_;
    *highest = highest_;
    *blocks = blocks_.size();
  }

  c10::DataPtr allocate(size_t bytes) override {
    void* found = bytes < smallest_ ? nullptr : take((bytes + GRAIN - 1) / GRAIN * GRAIN);
    if (found == nullptr) found = c10::alloc_cpu(bytes);
    c10::profiledCPUMemoryReporter().New(found, bytes);
    return {found, found, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  static Range& range() {
    static Range* found = new Range;  // never destroyed: tensors are freed until the process ends
    return *found;
  }

 private:
  static void release(void* pointer) {
    if (pointer == nullptr) return;
    c10::profiledCPUMemoryReporter().Delete(pointer);
    Range& own = range();
    const auto place = static_cast<size_t>(static_cast<char*>(pointer) - own.start_);
    if (place < own.size_) own.give(place);
    else c10::free_cpu(pointer);
  }

  void* take(size_t size) {
    std::lock_guard<std::mutex> guard(lock_);
    size_t place = top_;
    const auto hole = std::find_if(holes_.begin(), holes_.end(), [size](const auto& one) { return one.second >= size; });
    if (hole != holes_.end()) {
      place = hole->first;
      if (hole->second > size) holes_.emplace_hint(std::next(hole), place + size, hole->second - size);
      holes_.erase(hole);
    } else {
      if (size > size_ - top_) return nullptr;
      top_ += size;
      highest_ = std::max(highest_, top_);
    }
    blocks_.emplace(place, size);
    live_ += size;
    return start_ + place;
  }

  void give(size_t place) {
    std::lock_guard<std::mutex> guard(lock_);
    const auto block = blocks_.find(place);
    size_t size = block->second;
    blocks_.erase(block);
    live_ -= size;
    auto after = holes_.lower_bound(place);
    if (after != holes_.end() && after->first == place + size) {
      size += after->second;
      after = holes_.erase(after);
    }
    if (after != holes_.begin()) {
      const auto before = std::prev(after);
      if (before->first + before->second == place) {
        place = before->first;
        size += before->second;
        holes_.erase(before);
      }
    }
    if (place + size == top_) {
      top_ = place;
    } else {
      holes_.emplace(place, size);
    }
  }

  void give_back(size_t from, size_t to) {
    from = (from + page_ - 1) / page_ * page_;
    to = to / page_ * page_;
    if (from < to) madvise(start_ + from, to - from, MADV_DONTNEED);
  }

  std::mutex lock_;
  char* start_ = nullptr;
  size_t size_ = 0, page_ = 0;
  std::atomic<size_t> smallest_ = SIZE_MAX;
  size_t top_ = 0, highest_ = 0, live_ = 0;  // highest: above it no page was taken
  std::map<size_t, size_t> holes_;           // between blocks, size by place; none touches another, or the top
  std::unordered_map<size_t, size_t> blocks_;
};

}  // namespace

extern "C" {

// Tensors of `smallest` bytes and more are put into the range from here on; 0 if no range can be had.
int vlm_tune_open(int64_t smallest) {
  if (!Range::range().reserve()) return 0;
  Range::range().open(smallest);
  return 1;
}

void vlm_tune_shut() { Range::range().shut(); }

// Bytes that live in the range, those below the highest address in use since it was last shut, and how many blocks live.
void vlm_tune_state(int64_t* found) { Range::range().state(found, found + 1, found + 2); }
}
