// Runs the kernels outside of Python, for sanitizers, valgrind and other processors: test_kernels_elsewhere.py.
//
//   kernels_driver CASES OUT [LEVEL...]   every case on every level that there is (or on those named), each by one and
//                                         by three threads; results to OUT.LEVEL, one after another
//   kernels_driver CASES --hammer         100 products at once from ten threads; 1 if one differs from the first
//
// A case is a matrix and its inputs, as native_driver.py writes them. Each part ends where its memory ends, and starts
// one element behind where that starts: it is aligned as its elements are and no more. With GUARDED, the next byte is one
// that nobody may touch: sanitizers do not look into the instructions that load by a mask or into tiles.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#if defined(GUARDED)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "block.h"

using prunus::Attention;
using prunus::Completion;
using prunus::Matrix;
using prunus::Projection;

extern "C" {
int32_t prunus_interface_version();
const char* prunus_level();
const char* prunus_level_named(int32_t index);
int32_t prunus_use_level(const char* name);
void prunus_multiply(const Matrix*, int32_t count, const void* x, int32_t type, int64_t batch, void* const* out,
                     int32_t threads);
void prunus_expand(const Matrix*, int64_t first, int64_t strips, void* out, int32_t type, int32_t threads);
void prunus_attend(const Attention*, int32_t threads);
void prunus_project(const Projection*, int32_t threads);
void prunus_complete(const Completion*, int32_t threads);
}

namespace {

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "kernels_driver: %s\n", what.c_str());
  std::exit(1);
}

#if defined(GUARDED)
std::shared_ptr<char> allocate(size_t size) {
  const size_t page = sysconf(_SC_PAGESIZE), whole = (size + page - 1) / page * page;
  void* const all = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED || mprotect(static_cast<char*>(all) + whole, page, PROT_NONE)) fail("no memory");
  return {static_cast<char*>(all) + whole - size, [all, whole, page](char*) { munmap(all, whole + page); }};
}
#else
std::shared_ptr<char> allocate(size_t size) { return {static_cast<char*>(std::malloc(size)), std::free}; }
#endif

struct Part {
  std::shared_ptr<char> memory;
  size_t size;
  char* bytes;

  Part(size_t size, size_t element) : memory(allocate(element + size)), size(size), bytes(memory.get() + element) {}
};

template <class To>
To read(std::istream& from) {
  To value;
  if (!from.read(reinterpret_cast<char*>(&value), sizeof value)) fail("the cases end too early");
  return value;
}

Part read_part(std::istream& from) {
  const int64_t size = read<int64_t>(from);
  Part part(size, read<int64_t>(from));
  if (size && !from.read(part.bytes, size)) fail("a part ends too early");
  return part;
}

struct Case {
  Matrix matrix;
  int32_t type;
  int64_t batch;
  std::vector<Part> parts;  // weight, index, start, scale, inputs

  explicit Case(std::istream& from) {
    matrix.layout = read<int32_t>(from);
    matrix.type = read<int32_t>(from);
    matrix.rows = read<int64_t>(from);
    matrix.columns = read<int64_t>(from);
    type = static_cast<int32_t>(read<int64_t>(from));
    batch = read<int64_t>(from);
    for (int part = 0; part < 5; ++part) parts.push_back(read_part(from));
    matrix.weight = parts[0].bytes;
    matrix.index = parts[1].bytes;
    matrix.start = reinterpret_cast<const int64_t*>(parts[2].bytes);
    matrix.scale = parts[3].size ? reinterpret_cast<const float*>(parts[3].bytes) : nullptr;
  }

  size_t element() const { return type == prunus::kFloat32 ? sizeof(float) : sizeof(uint16_t); }

  Part product(int threads) const {
    Part out(batch * matrix.rows * element(), element());
    void* const to[] = {out.bytes};
    prunus_multiply(&matrix, 1, parts[4].bytes, type, batch, to, threads);
    return out;
  }

  Part expanded(int threads) const {
    Part out(matrix.rows * matrix.columns * element(), element());
    prunus_expand(&matrix, 0, prunus::strips_of(matrix), out.bytes, type, threads);
    return out;
  }

  // The inputs as keys, values and, the first of them, as the heads of a query; every third position is masked out.
  Part attended(int threads) const {
    const int64_t columns = matrix.columns, width = std::min<int64_t>(columns, prunus::kMaxWidth);
    const int64_t heads = std::min<int64_t>(batch, 6);
    Part out(heads * width * element(), element()), mask(batch, 1);
    for (int64_t t = 0; t < batch; ++t) mask.bytes[t] = t % 3 != 1;
    const void* const x = parts[4].bytes;
    const Attention attention{type, 1, heads, 1, batch, width, x, x, x, 0, columns, 0, 0, columns, 0, 0, columns,
                              reinterpret_cast<const uint8_t*>(mask.bytes), 0, 0.25f, out.bytes};
    prunus_attend(&attention, threads);
    return out;
  }

  bool is_square() const { return matrix.rows == matrix.columns && matrix.rows % 4 == 0; }

  // Two heads' block without an attention: the matrix is all seven, and the first input is norms and biases. Queries stand
  // for what was attended to, keys for the hidden states; cosines are a half of the inputs, and sines the other one.
  Part stepped(int threads) const {
    const int64_t width = matrix.columns, head = width / 2;
    const size_t size = batch * width * element();
    Part query(size, element()), key(size, element()), value(size, element()), out(size, element());
    const char* const x = parts[4].bytes;
    Part norm(width * element(), element()), head_norm(head * element(), element());
    std::memcpy(norm.bytes, x, norm.size);
    std::memcpy(head_norm.bytes, x, head_norm.size);
    Projection first{type, batch, width, head, x, x, x + head * element(), width, {norm.bytes, 1e-5f},
                     {head_norm.bytes, 1e-6f}, {nullptr, 0}, {matrix, matrix, matrix}, {norm.bytes, nullptr, nullptr},
                     {query.bytes, key.bytes, value.bytes}};
    prunus_project(&first, threads);
    const Completion second{type, batch, width, key.bytes, query.bytes, {norm.bytes, 1e-5f},
                            {matrix, matrix, matrix, matrix}, {nullptr, norm.bytes, nullptr, norm.bytes}, out.bytes};
    prunus_complete(&second, threads);
    return out;
  }
};

bool equal(const Part& one, const Part& other) {
  return one.size == other.size && !std::memcmp(one.bytes, other.bytes, one.size);
}

std::vector<Case> read_cases(const char* file) {
  std::ifstream from(file, std::ios::binary);
  if (!from) fail(std::string("cannot read ") + file);
  std::vector<Case> cases;
  while (from.peek() != EOF) cases.emplace_back(from);
  return cases;
}

void write(std::ostream& to, const Part& part) { to.write(part.bytes, part.size); }

void run(const std::vector<Case>& cases, const std::string& level, const std::string& out) {
  if (prunus_use_level(level.c_str())) fail("no level " + level);
  std::ofstream to(out + "." + level, std::ios::binary);
  for (const Case& one : cases) {
    const Part product = one.product(1), expanded = one.expanded(1), attended = one.attended(1);
    if (!equal(product, one.product(3)) || !equal(expanded, one.expanded(3)) || !equal(attended, one.attended(3)))
      fail("threads change the result");
    write(to, product);
    write(to, expanded);
    write(to, attended);
    if (!one.is_square()) continue;
    const Part stepped = one.stepped(1);
    if (!equal(stepped, one.stepped(3))) fail("threads change a block");
    write(to, stepped);
  }
  if (!to.flush()) fail("cannot write " + out);
}

void hammer(const std::vector<Case>& cases) {
  constexpr int kCallers = 10, kProducts = 100;
  std::vector<Part> wanted;
  for (const Case& one : cases) wanted.push_back(one.product(1));
  std::atomic<int> next{0}, wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller)
    callers.emplace_back([&] {
      for (int index; (index = next++) < kProducts;) {
        const size_t which = index % cases.size();
        wrong += !equal(cases[which].product(1 + index % 5), wanted[which]);
      }
    });
  for (auto& caller : callers) caller.join();
  if (wrong) fail(std::to_string(wrong) + " products differ");
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) fail("CASES OUT [LEVEL...], or CASES --hammer");
  if (prunus_interface_version() != 3) fail("the interface is another one");
  const std::vector<Case> cases = read_cases(arguments[1]);
  if (!std::strcmp(arguments[2], "--hammer")) {
    hammer(cases);
    return 0;
  }
  std::vector<std::string> levels(arguments + 3, arguments + count);
  for (int index = 0; count == 3 && prunus_level_named(index); ++index) levels.push_back(prunus_level_named(index));
  for (const std::string& level : levels) {
    run(cases, level, arguments[2]);
    std::puts(level.c_str());
  }
}
