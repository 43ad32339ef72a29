#include "machine/probe.h"

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace parco {
namespace {

using Clock = std::chrono::steady_clock;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<std::uint8_t, Free>;

Buffer allocate(std::size_t bytes) {
  void* p = std::aligned_alloc(4096, bytes);
  if (!p) throw std::bad_alloc();
  return Buffer(static_cast<std::uint8_t*>(p));
}

// SplitMix64: zeros and repeated values let a CPU run faster than it does on real data.
std::uint64_t next(std::uint64_t& state) {
  std::uint64_t z = (state += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

void fill_operands(std::uint8_t* out, Element element, std::uint64_t seed) {
  std::uint64_t state = seed;
  for (std::size_t i = 0; i < probe_operand_bytes; i += 4) {
    const std::uint64_t random = next(state);
    if (element == Element::fp32 || element == Element::bf16) {
      // Uniform in (-1, 1): no infinities or subnormals, whose handling has another speed.
      const float value = static_cast<float>(static_cast<std::int64_t>(random)) * 0x1p-63f;
      std::memcpy(out + i, &value, 4);
      if (element == Element::bf16) std::memcpy(out + i, out + i + 2, 2);  // the upper half of a float is a bf16
    } else {
      std::memcpy(out + i, &random, 4);
    }
  }
}

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

// Seconds from the moment every thread is ready until the last has finished work(thread).
template <typename Work>
double timed(int threads, const Work& work) {
  Clock::time_point start;
#pragma omp parallel num_threads(threads)
  {
#pragma omp barrier
#pragma omp master
    start = Clock::now();
#pragma omp barrier
    work(omp_get_thread_num());
  }
  return seconds_since(start);
}

// Thread t's share of `bytes`, in whole pages.
std::size_t share_begin(std::size_t bytes, int threads, int t) { return bytes / 4096 * t / threads * 4096; }

// Writes random data from the threads that will read it, so that each page lies near its reader.
Buffer random_buffer(std::size_t bytes, int threads) {
  Buffer buffer = allocate(bytes);
  timed(threads, [&](int t) {
    std::uint64_t state = static_cast<std::uint64_t>(t) + 1;
    for (std::size_t i = share_begin(bytes, threads, t), end = share_begin(bytes, threads, t + 1); i < end; i += 8) {
      const std::uint64_t random = next(state);
      std::memcpy(buffer.get() + i, &random, 8);
    }
  });
  return buffer;
}

const Products& products_of(Isa isa, Element element) {
  static const Products* const table[5][4] = {
      {&generic_fp32, &generic_bf16, &generic_int16, &generic_int8},
      {&avx2_fp32, &avx2_bf16, &avx2_int16, &avx2_int8},
      {&avx512_fp32, &avx512_bf16, &avx512_int16, &avx512_int8},
      {&avx512_fp32, &avx512_bf16, &avx512_vnni_int16, &avx512_vnni_int8},
      {&avx512_fp32, &amx_bf16, &avx512_vnni_int16, &amx_int8},
  };
  return *table[static_cast<int>(isa)][static_cast<int>(element)];
}

volatile std::uint64_t sink;

}  // namespace

double multiply_adds_per_second(Isa isa, Element element, int threads, double seconds, int repeats) {
  const Products& products = products_of(isa, element);
  const Buffer operands = allocate(probe_operand_bytes * threads);
  for (int t = 0; t < threads; ++t) fill_operands(operands.get() + t * probe_operand_bytes, element, t + 1);
  std::vector<std::uint64_t> results(threads * 8);  // a cache line apart
  const auto run = [&](std::int64_t rounds) {
    return timed(threads,
                 [&](int t) { results[t * 8] = products.run(operands.get() + t * probe_operand_bytes, rounds); });
  };
  // How many rounds fill the time, found on one thread alone: with all of them, waiting for a busy core would count as
  // work.
  std::int64_t rounds = 16;
  double took = 0;
  for (;; rounds *= 2) {
    const auto start = Clock::now();
    results[0] = products.run(operands.get(), rounds);
    took = seconds_since(start);
    if (took > seconds / 4) break;
  }
  rounds = std::max<std::int64_t>(1, static_cast<std::int64_t>(rounds * seconds / took));
  run(rounds);  // starts the threads, and brings the clock to the frequency that this load runs at
  std::vector<double> rates;
  for (int i = 0; i < repeats; ++i)
    rates.push_back(static_cast<double>(rounds) * products.multiply_adds_per_round * threads / run(rounds));
  for (int t = 0; t < threads; ++t) sink = results[t * 8];
  return median(rates);
}

static Read* read_of(Isa isa) {
  return isa == Isa::generic ? generic_read : isa == Isa::avx2 ? avx2_read : avx512_read;
}

void read_once(Isa isa, const std::uint8_t* data, std::size_t bytes, int threads) {
  Read* const read = read_of(isa);
  std::uint64_t sum = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(^ : sum)
  for (int t = 0; t < threads; ++t) {
    const std::size_t begin = share_begin(bytes, threads, t), end = share_begin(bytes, threads, t + 1);
    sum ^= read(data + begin, end - begin);
  }
  sink = sum;
}

double read_bytes_per_second(Isa isa, std::size_t bytes, int threads, int repeats) {
  Read* const read = read_of(isa);
  const Buffer buffer = random_buffer(bytes, threads);
  std::vector<std::uint64_t> results(threads * 8);
  std::vector<double> rates;
  for (int i = 0; i < repeats; ++i) {
    const double took = timed(threads, [&](int t) {
      const std::size_t begin = share_begin(bytes, threads, t), end = share_begin(bytes, threads, t + 1);
      results[t * 8] = read(buffer.get() + begin, end - begin);
    });
    rates.push_back(bytes / took);
  }
  for (int t = 0; t < threads; ++t) sink = results[t * 8];
  return median(rates);
}

double copy_bytes_per_second(std::size_t bytes, int threads, int repeats) {
  const Buffer from = random_buffer(bytes, threads), to = random_buffer(bytes, threads);
  std::vector<double> rates;
  for (int i = 0; i < repeats; ++i) {
    const double took = timed(threads, [&](int t) {
      const std::size_t begin = share_begin(bytes, threads, t), end = share_begin(bytes, threads, t + 1);
      std::memcpy(to.get() + begin, from.get() + begin, end - begin);
    });
    rates.push_back(bytes / took);
  }
  sink = to.get()[bytes / 2];
  return median(rates);
}

}  // namespace parco
