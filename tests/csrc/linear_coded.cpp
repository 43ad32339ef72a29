// Every instruction set of the products over stored codes, on shapes that no vector divides; built with sanitizers too.
// In integers all must give the bits of the generic one; in fp32, and the rows that are looked up, what sums in double
// say. Inputs lie at odd addresses in buffers of exactly their size, so that a read past an end is seen.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "embedding/embedding.h"
#include "linear/float.h"
#include "linear/int.h"
#include "linear/panels.h"
#include "machine/features.h"

using namespace parco::linear;

namespace {

struct Kernel {
  const char* name;
  void (*run)(const CodedCall&);
};

// Bytes at an odd address; freed as one block, so the sanitizer knows both ends.
struct Bytes {
  explicit Bytes(std::size_t count) : block(count + 1), data(block.data() + 1) {}
  std::vector<char> block;
  char* data;
};

struct Shape {
  std::int64_t rows, outputs, columns, group, block_rows;
};

// What a format says of its codes. `span` bounds the random ones.
struct Codes {
  const char* name;
  int bits;
  Element element;
  std::vector<float> values;
  std::vector<std::uint8_t> table;
  float unit;
  int zero_point;
};

int failures = 0, packs_tried = 0;
std::mt19937 random_bits(20);

void fill(char* data, std::size_t count) {
  for (std::size_t i = 0; i < count; i++) data[i] = static_cast<char>(random_bits());
}

// Floats of few bits, which every type holds exactly.
void fill_floats(Bytes& to, std::vector<double>& exact, std::int64_t count, Type type) {
  exact.resize(count);
  for (std::int64_t i = 0; i < count; i++) {
    const int eighths = static_cast<int>(8 + random_bits() % 8), power = static_cast<int>(random_bits() % 4) - 3;
    const float value =
        std::ldexp(static_cast<float>(eighths), power) * (random_bits() & 1 && type < Type::e8m0 ? -1 : 1);
    exact[i] = static_cast<double>(value);
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const std::uint32_t magnitude = bits & 0x7fffffff;
    const std::uint16_t bf16 = static_cast<std::uint16_t>(bits >> 16);
    const std::uint16_t fp16 = static_cast<std::uint16_t>((bits >> 16 & 0x8000) | (magnitude - 0x38000000) >> 13);
    if (type == Type::fp32)
      std::memcpy(to.data + 4 * i, &value, 4);
    else if (type < Type::e8m0)
      std::memcpy(to.data + 2 * i, type == Type::bf16 ? &bf16 : &fp16, 2);
    else if (type == Type::e4m3)
      to.data[i] = static_cast<char>((magnitude >> 20) - (120 << 3));
    else {
      to.data[i] = static_cast<char>(127 + power);
      exact[i] = std::ldexp(1.0, power);
    }
  }
}

float as_float(const char* from, Type type, std::int64_t i) {
  float value;
  std::uint16_t half;
  if (type == Type::fp32) {
    std::memcpy(&value, from + 4 * i, 4);
    return value;
  }
  std::memcpy(&half, from + 2 * i, 2);
  if (type == Type::bf16) {
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  value = std::ldexp(static_cast<float>(exponent ? 1024 + mantissa : mantissa), (exponent ? exponent : 1) - 25);
  return half & 0x8000 ? -value : value;
}

// What int8 with a scale per row keeps of each number.
void to_int8(std::vector<double>& x, const Shape& shape) {
  for (std::int64_t m = 0; m < shape.rows; m++) {
    double* row = x.data() + m * shape.columns;
    float largest = 0;
    for (std::int64_t k = 0; k < shape.columns; k++) largest = std::max(largest, std::abs(static_cast<float>(row[k])));
    const float scale = largest / 127;
    for (std::int64_t k = 0; k < shape.columns; k++)
      row[k] = static_cast<double>(std::nearbyint(static_cast<float>(row[k]) / scale)) * static_cast<double>(scale);
  }
}

// Panels as coded.h describes them; rows past the last hold anything.
struct Packed {
  Packed(const CodedCall& plain, std::int64_t groups)
      : panels((plain.outputs + 15) / 16),
        dwords(plain.columns * plain.bits / 32),
        moved(plain.block_rows == 1 && groups > 1),
        codes(panels * dwords * 64),
        scale(panels * 16 * groups * size_of(plain.scale_type)),
        zero(panels * 16 * groups),
        call(plain) {
    const int size = size_of(plain.scale_type);
    for (std::int64_t n = 0; n < panels * 16; n++) {
      const std::int64_t from = std::min(n, plain.outputs - 1);
      const std::string stream = planes(plain, from);
      for (std::int64_t d = 0; d < dwords; d++)
        std::memcpy(codes.data + ((n / 16 * dwords + d) * 16 + n % 16) * 4, stream.data() + d * 4, 4);
      for (std::int64_t g = 0; moved && g < groups; g++) {
        const std::int64_t to = (n / 16 * groups + g) * 16 + n % 16;
        std::memcpy(scale.data + to * size, static_cast<const char*>(plain.scale) + (from * groups + g) * size, size);
        if (plain.zero) zero.data[to] = static_cast<char>(plain.zero[from * groups + g]);
      }
    }
    call.packed = true;
    call.codes = reinterpret_cast<const std::uint8_t*>(codes.data);
    if (!moved) return;
    call.scale = scale.data;
    if (plain.zero) call.zero = reinterpret_cast<const std::uint8_t*>(zero.data);
  }
  // Row n's stream with the bits of every 32 codes in planes.
  static std::string planes(const CodedCall& plain, std::int64_t n) {
    const std::int64_t row_bytes = plain.columns * plain.bits / 8;
    std::string found(reinterpret_cast<const char*>(plain.codes) + n * row_bytes, row_bytes);
    const int low = plain.bits == 3 ? 2 : 4, left = plain.bits - low;
    if (plain.bits == 2 || plain.bits == 4 || plain.bits == 8) return found;
    const std::string rows = found;
    const auto bit = [&](std::int64_t from, std::int64_t to) {
      const int value = rows[from / 8] >> from % 8 & 1;
      found[to / 8] = static_cast<char>((found[to / 8] & ~(1 << to % 8)) | value << to % 8);
    };
    for (std::int64_t k = 0; k < plain.columns; k++) {
      const std::int64_t run = k / 32 * 32 * plain.bits, c = k % 32;
      for (int b = 0; b < low; b++) bit(k * plain.bits + b, run + c * low + b);
      // 4 bits: even codes of a dword of 8 in one vector, odd ones in the next. 2 bits: every fourth of a dword of 16.
      const std::int64_t vector = low == 4 ? c / 8 * 2 + c % 2 : c / 16 * 4 + c % 4;
      const std::int64_t byte = low == 4 ? c % 8 / 2 : c % 16 / 4;
      for (int b = 0; b < left; b++)
        bit(k * plain.bits + low + b, run + 32 * low + (vector * left / 8) * 32 + 8 * byte + vector * left % 8 + b);
    }
    return found;
  }
  static bool can(const CodedCall& plain) {
    const bool whole = plain.bits == 2 || plain.bits == 4 || plain.bits == 8;
    const std::int64_t together = whole ? 32 / plain.bits : 32;
    return plain.bits != 7 && !(plain.bits == 8 && plain.table) && plain.columns % together == 0 &&
           (plain.group % together == 0 || plain.group >= plain.columns);
  }
  std::int64_t panels, dwords;
  bool moved;
  Bytes codes, scale, zero;
  CodedCall call;
};

double activated(Activation activation, double x) {
  switch (activation) {
    case Activation::silu:
      return x / (1 + std::exp(-x));
    case Activation::gelu:
      return x / 2 * std::erfc(-x / std::sqrt(2.0));
    case Activation::gelu_tanh:
      return x / 2 * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
    case Activation::relu:
      return std::max(x, 0.0);
    case Activation::relu_squared:
      return std::max(x, 0.0) * std::max(x, 0.0);
    case Activation::none:
      break;
  }
  return x;
}

// A product with an activation, an addend of x's type or fp32 (which may be y itself), and y of either: what comes of
// the sums in double that are `expected` within `slack`.
struct Finished {
  Finished(const CodedCall& plain, const std::vector<double>& expected, const std::vector<double>& slack)
      : call(plain), wanted(expected), slack(slack) {
    const std::int64_t count = plain.rows * plain.outputs;
    call.after.activation = static_cast<Activation>(static_cast<int>(random_bits() % 6) - 1);
    call.after.addend_type = random_bits() % 2 ? plain.x_type : Type::fp32;
    call.y_type = random_bits() % 2 ? plain.x_type : Type::fp32;
    const bool adds = call.after.activation == Activation::none || random_bits() % 2;
    in_place = adds && call.after.addend_type == call.y_type && random_bits() % 2;
    addend = Bytes(count * size_of(call.after.addend_type));
    std::vector<double> exact(count);
    if (adds) fill_floats(addend, exact, count, call.after.addend_type);
    if (adds) call.after.addend = addend.data;
    const double unit = call.y_type == Type::fp32 ? 0x1p-24 : call.y_type == Type::bf16 ? 0x1p-8 : 0x1p-11;
    for (std::int64_t i = 0; i < count; i++) {
      // No slope is above 1.13, but that of the square.
      const double x = wanted[i], steep = call.after.activation == Activation::relu_squared ? 2 * std::abs(x) + 1 : 1.2;
      wanted[i] = activated(call.after.activation, x) + exact[i];
      const double polynomials = call.after.activation == Activation::none ? 0 : 2e-6 * (1 + std::abs(x) * steep);
      this->slack[i] = slack[i] * steep + polynomials + (unit + 0x1p-24) * std::abs(wanted[i]) + 0x1p-24;
    }
  }
  // Whether all that compute in integers give the same bits: they do but for polynomials.
  bool same_bits() const {
    return call.after.activation == Activation::none || call.after.activation == Activation::relu ||
           call.after.activation == Activation::relu_squared;
  }
  std::string run(void (*kernel)(const CodedCall&), const CodedCall& from, int threads) const {
    const std::size_t bytes = wanted.size() * size_of(call.y_type);
    Bytes y(bytes);
    CodedCall own = call;
    own.codes = from.codes, own.scale = from.scale, own.zero = from.zero, own.packed = from.packed;
    own.y = y.data, own.threads = threads;
    if (in_place) std::memcpy(y.data, addend.data, bytes), own.after.addend = y.data;
    kernel(own);
    return std::string(y.data, bytes);
  }
  bool holds(const std::string& y) const {
    for (std::size_t i = 0; i < wanted.size(); i++) {
      if (call.y_type == Type::fp16 && std::abs(wanted[i]) > 65000) continue;
      const double found = static_cast<double>(as_float(y.data(), call.y_type, static_cast<std::int64_t>(i)));
      if (!(std::abs(found - wanted[i]) <= slack[i])) return false;
    }
    return true;
  }
  CodedCall call;
  bool in_place;
  Bytes addend{0};
  std::vector<double> wanted, slack;
};

// `packed_kernels` read panels, where a shape has some.
void check(const std::vector<Kernel>& kernels, const std::vector<Kernel>& packed_kernels, const Codes& format,
           Shape shape, Type x_type, Type scale_type, bool asymmetric, bool same_bits, bool int8 = false) {
  const std::int64_t groups = (shape.columns + shape.group - 1) / shape.group;
  const std::int64_t down = (shape.outputs + shape.block_rows - 1) / shape.block_rows;
  const std::int64_t row_bytes = (shape.columns * format.bits + 7) / 8;
  Bytes x(shape.rows * shape.columns * size_of(x_type)), codes(shape.outputs * row_bytes);
  Bytes scale(down * groups * size_of(scale_type)), zero(down * groups), bias(shape.outputs * size_of(x_type));
  std::vector<double> exact_x, exact_scale, exact_bias;
  fill_floats(x, exact_x, shape.rows * shape.columns, x_type);
  if (int8) to_int8(exact_x, shape);
  fill_floats(scale, exact_scale, down * groups, scale_type);
  fill_floats(bias, exact_bias, shape.outputs, x_type);
  fill(codes.data, shape.outputs * row_bytes);
  const auto finite = [&](int code) { return std::isfinite(format.values[code]); };
  for (std::int64_t i = 0; format.bits == 8 && i < shape.outputs * row_bytes; i++)
    if (!finite(static_cast<std::uint8_t>(codes.data[i]))) codes.data[i] = 1;
  for (std::int64_t i = 0; i < down * groups; i++)
    zero.data[i] = static_cast<char>(random_bits() & ((1 << format.bits) - 1));
  const float factor = 0.75f;
  const CodedCall call{x.data,
                       reinterpret_cast<const std::uint8_t*>(codes.data),
                       format.values.data(),
                       format.table.empty() ? nullptr : format.table.data(),
                       scale.data,
                       asymmetric ? reinterpret_cast<const std::uint8_t*>(zero.data) : nullptr,
                       scale_type == Type::e4m3 ? &factor : nullptr,
                       shape.rows % 2 ? bias.data : nullptr,
                       nullptr,
                       shape.rows,
                       shape.outputs,
                       shape.columns,
                       shape.group,
                       shape.block_rows,
                       groups,
                       format.unit,
                       format.zero_point,
                       format.bits,
                       1,
                       false,
                       int8,
                       format.element,
                       x_type,
                       scale_type,
                       x_type};
  const auto weight = [&](std::int64_t n, std::int64_t k) {
    int code = 0;
    for (int b = 0; b < format.bits; b++) {
      const std::int64_t bit = k * format.bits + b;
      code |= (codes.data[n * row_bytes + bit / 8] >> bit % 8 & 1) << b;
    }
    const std::int64_t at = n / shape.block_rows * groups + k / shape.group;
    const double number = asymmetric ? code - static_cast<std::uint8_t>(zero.data[at]) : format.values[code];
    return number * exact_scale[at] * (call.factor ? 0.75 : 1.0);
  };
  const auto tell = [&](const char* name, const char* what, int threads) {
    failures++;
    std::printf(
        "%s of %s: %s; rows %ld outputs %ld columns %ld group %ld x_type %d scale_type %d zero %d int8 %d threads %d\n",
        name, format.name, what, static_cast<long>(shape.rows), static_cast<long>(shape.outputs),
        static_cast<long>(shape.columns), static_cast<long>(shape.group), static_cast<int>(x_type),
        static_cast<int>(scale_type), asymmetric, int8, threads);
  };
  CodedCall empty{};
  empty.bits = 8, empty.block_rows = 1;
  const bool packs = Packed::can(call);
  const Packed packed(packs ? call : empty, packs ? groups : 0);
  const auto run = [&](const Kernel& kernel, const CodedCall& call, int threads) {
    Bytes y(shape.rows * shape.outputs * size_of(x_type));
    fill(y.data, shape.rows * shape.outputs * size_of(x_type));
    CodedCall own = call;
    own.y = y.data;
    own.threads = threads;
    kernel.run(own);
    return std::string(y.data, shape.rows * shape.outputs * size_of(x_type));
  };
  std::vector<double> expected(shape.rows * shape.outputs), bound(expected.size());
  for (std::int64_t n = 0; n < shape.outputs; n++) {
    std::vector<double> row(shape.columns);
    for (std::int64_t k = 0; k < shape.columns; k++) row[k] = weight(n, k);
    for (std::int64_t m = 0; m < shape.rows; m++) {
      double sum = call.bias ? exact_bias[n] : 0.0, size = std::abs(sum);
      for (std::int64_t k = 0; k < shape.columns; k++) {
        sum += exact_x[m * shape.columns + k] * row[k];
        size += std::abs(exact_x[m * shape.columns + k] * row[k]);
      }
      expected[m * shape.outputs + n] = sum, bound[m * shape.outputs + n] = size;
    }
  }
  // x has 4 bits within 2^7 of the largest: exact as words of 15. Then sums in fp32, and a rounding to y's type.
  const double unit = x_type == Type::fp32 ? 0 : x_type == Type::bf16 ? 0x1p-8 : 0x1p-11;
  const std::string first = run(kernels[0], call, 1);
  const auto compare = [&](const char* name, const std::string& y, int threads, const char* what) {
    for (std::size_t i = 0; i < expected.size(); i++) {
      const double found = static_cast<double>(as_float(y.data(), x_type, static_cast<std::int64_t>(i)));
      if (x_type == Type::fp16 && std::abs(expected[i]) > 65000) continue;
      const double slack = bound[i] * 0x1p-24 * (static_cast<double>(shape.columns) + 4) + std::abs(expected[i]) * unit;
      if (std::abs(found - expected[i]) <= slack * 1.01 + (x_type == Type::fp16 ? 0x1p-24 : 0)) continue;
      return tell(name, what, threads);
    }
  };
  std::vector<std::string> alone;  // of the packed kernels, by one thread
  for (int threads : {1, 3}) {
    for (const Kernel& kernel : kernels) {
      const std::string y = run(kernel, call, threads);
      if (same_bits && y != first) tell(kernel.name, "other bits than the first", threads);
      compare(kernel.name, y, threads, "not the sum in double");
    }
    for (std::size_t i = 0; packs && i < packed_kernels.size(); i++) {
      const Kernel& kernel = packed_kernels[i];
      packs_tried++;
      const std::string y = run(kernel, packed.call, threads);
      if (threads == 1) alone.push_back(y);
      if (same_bits && y != first) tell(kernel.name, "packed, other bits", threads);
      if (y != alone[i]) tell(kernel.name, "packed, other bits with more threads", threads);
      compare(kernel.name, y, threads, "packed, not the sum in double");
    }
  }
  std::vector<double> slack(expected.size());
  for (std::size_t i = 0; i < slack.size(); i++)
    slack[i] = bound[i] * 0x1p-24 * (static_cast<double>(shape.columns) + 4);
  const Finished finished(call, expected, slack);
  std::string same;
  const auto finish = [&](const Kernel& kernel, const CodedCall& from, const char* what) {
    const std::string y = finished.run(kernel.run, from, 2);
    if (!finished.holds(y)) tell(kernel.name, what, 2);
    if (same_bits && finished.same_bits() && !same.empty() && y != same) tell(kernel.name, "finished, other bits", 2);
    same = y;
  };
  for (const Kernel& kernel : kernels) finish(kernel, call, "finished, not the numbers in double");
  for (const Kernel& kernel : packed_kernels)
    if (packs) finish(kernel, packed.call, "packed and finished, not the numbers in double");
  if (packs) {
    const std::size_t bytes = packed.codes.block.size() - 1, plain_bytes = codes.block.size() - 1;
    Bytes panels(bytes), rows(plain_bytes);
    pack_codes(call.codes, reinterpret_cast<std::uint8_t*>(panels.data), shape.outputs, shape.columns, call.bits, 2);
    const std::int64_t last = shape.outputs % 16;
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(bytes); i++) {
      const bool padding = last && i / 64 / packed.dwords == packed.panels - 1 && i % 64 / 4 >= last;
      if (panels.data[i] == (padding ? 0 : packed.codes.data[i])) continue;
      tell("pack", "other panels", 2);
      break;
    }
    unpack_codes(packed.call.codes, reinterpret_cast<std::uint8_t*>(rows.data), shape.outputs, shape.columns, call.bits,
                 2);
    if (std::memcmp(rows.data, codes.data, plain_bytes)) tell("unpack", "other rows", 2);
  }
  const std::int64_t indices[] = {shape.outputs - 1, 0, shape.outputs / 2};
  Bytes y(3 * shape.columns * size_of(x_type));
  CodedCall rows = call;
  rows.y = y.data, rows.rows = 3;
  if (parco::embedding::embedding_generic(rows, indices) != -1) tell("lookup", "refused its rows", 1);
  if (packs) {
    Bytes from_packed(3 * shape.columns * size_of(x_type));
    CodedCall own = packed.call;
    own.y = from_packed.data, own.rows = 3;
    parco::embedding::embedding_generic(own, indices);
    if (std::memcmp(y.data, from_packed.data, 3 * shape.columns * size_of(x_type)))
      tell("lookup", "packed, other rows", 1);
  }
  for (std::int64_t i = 0; i < 3 * shape.columns; i++) {
    const double wanted = weight(indices[i / shape.columns], i % shape.columns);
    const double found = static_cast<double>(as_float(y.data, x_type, i));
    if (x_type == Type::fp16 && std::abs(wanted) > 65000) continue;
    if (std::abs(found - wanted) <= std::abs(wanted) * (0x1p-22 + unit) + 0x1p-24) continue;
    tell("lookup", "not the number", 1);
    break;
  }
}

// Rows of 4-bit codes under fp32 scales of groups, and the numbers that they are.
struct CodedRows {
  CodedRows(const Codes& format, std::int64_t rows, const Shape& shape)
      : groups((shape.columns + shape.group - 1) / shape.group),
        bytes((shape.columns + 1) / 2),
        codes(rows * bytes),
        scale(rows * groups),
        exact(rows * shape.columns) {
    fill(codes.data, rows * bytes);
    for (float& each : scale) each = std::ldexp(static_cast<float>(8 + random_bits() % 8), -3);
    for (std::int64_t i = 0; i < rows * shape.columns; i++) {
      const std::int64_t row = i / shape.columns, k = i % shape.columns;
      const int code = codes.data[row * bytes + k / 2] >> k % 2 * 4 & 15;
      exact[i] = static_cast<double>(format.values[code]) * static_cast<double>(scale[row * groups + k / shape.group]);
    }
  }
  std::int64_t groups, bytes;
  Bytes codes;
  std::vector<float> scale;
  std::vector<double> exact;
};

// Both operands of `format`: where a row ends within a byte, the other half holds anything.
void check_both(const char* name, void (*kernel)(const CodedCall&), const Codes& format, const Shape& shape) {
  CodedRows x(format, shape.rows, shape), weights(format, shape.outputs, shape);
  std::vector<float> x_scale = x.scale;
  for (float& each : x_scale) each *= format.unit;
  CodedCall call{};
  call.x = x.codes.data, call.codes = reinterpret_cast<const std::uint8_t*>(weights.codes.data);
  call.x_scale = x_scale.data(), call.scale = weights.scale.data();
  call.values = format.values.data(), call.table = format.table.data();
  call.rows = shape.rows, call.outputs = shape.outputs, call.columns = shape.columns;
  call.group = shape.group, call.block_rows = 1, call.scale_stride = weights.groups;
  call.unit = format.unit, call.zero_point = format.zero_point, call.bits = 4, call.int8 = true;
  call.element = format.element;
  std::string first;
  for (int threads : {1, 3}) {
    Bytes y(shape.rows * shape.outputs * 4);
    call.y = y.data, call.threads = threads;
    kernel(call);
    const std::string found(y.data, shape.rows * shape.outputs * 4);
    bool right = first.empty() || found == first;
    first = found;
    for (std::int64_t i = 0; i < shape.rows * shape.outputs; i++) {
      double sum = 0, size = 0;
      for (std::int64_t k = 0; k < shape.columns; k++) {
        const double product =
            x.exact[i / shape.outputs * shape.columns + k] * weights.exact[i % shape.outputs * shape.columns + k];
        sum += product, size += std::abs(product);
      }
      const double slack = size * 0x1p-24 * (static_cast<double>(weights.groups) + 4);
      right = right && std::abs(static_cast<double>(as_float(y.data, Type::fp32, i)) - sum) <= slack;
    }
    if (right) continue;
    failures++;
    std::printf("both %s %s: rows %ld outputs %ld columns %ld group %ld threads %d\n", name, format.name,
                static_cast<long>(shape.rows), static_cast<long>(shape.outputs), static_cast<long>(shape.columns),
                static_cast<long>(shape.group), threads);
  }
}

Codes integers(int bits) {
  Codes codes{"int", bits, Element::listed, {}, {}, 1.0f, 1 << (bits - 1)};
  for (int code = 0; code < 1 << bits; code++) codes.values.push_back(static_cast<float>(code - codes.zero_point));
  return codes;
}

// A float of 1 + exponent + mantissa bits without codes for infinity; `nans` of the greatest magnitudes are none.
Codes floats(const char* name, int exponent_bits, int mantissa_bits, Element element, int nans, int infinity) {
  const int bits = 1 + exponent_bits + mantissa_bits, bias = (1 << (exponent_bits - 1)) - 1;
  Codes codes{name, bits, element, {}, {}, 1.0f, 0};
  for (int code = 0; code < 1 << bits; code++) {
    const int magnitude = code & ((1 << (bits - 1)) - 1), exponent = magnitude >> mantissa_bits;
    const int mantissa = magnitude & ((1 << mantissa_bits) - 1);
    float value = std::ldexp(static_cast<float>(exponent ? (1 << mantissa_bits) + mantissa : mantissa),
                             (exponent ? exponent : 1) - bias - mantissa_bits);
    if (magnitude >= (1 << (bits - 1)) - nans) value = std::nanf("");
    if (infinity && magnitude == infinity) value = HUGE_VALF;
    codes.values.push_back(code >> (bits - 1) ? -value : value);
  }
  return codes;
}

// The same as multiples of `unit`, above `zero_point`.
Codes listed(Codes codes, float unit, int zero_point) {
  codes.unit = unit, codes.zero_point = zero_point;
  for (int i = 0; i < 64; i++)
    codes.table.push_back(
        static_cast<std::uint8_t>(codes.values[i % codes.values.size()] / unit + static_cast<float>(zero_point)));
  return codes;
}

}  // namespace

// `linear_coded N` tries N random shapes instead of the chosen ones.
int main(int argc, char** argv) {
  std::vector<Kernel> integer{{"int generic", int_generic}}, real{{"float generic", float_generic}};
  if (parco::features().avx2) integer.push_back({"int avx2", int_avx2});
  if (parco::features().avx512) integer.push_back({"int avx512", int_avx512});
  if (parco::features().avx512_vbmi) {
    integer.push_back({"int avx512_vbmi", int_avx512_vbmi});
    integer.push_back({"int amx emulated", int_amx_emulated});
  }
  if (parco::features().amx) integer.push_back({"int amx", int_amx});
  std::vector<Kernel> vectors = real;
  if (parco::features().avx2) vectors.push_back({"float avx2", float_avx2});
  if (parco::features().avx512) vectors.push_back({"float avx512", float_avx512});
  if (parco::features().avx512_vbmi) vectors.push_back({"float avx512_vbmi", float_avx512_vbmi});
  // Of bf16 x; here every number times its scale is one of bf16.
  std::vector<Kernel> tiles;
  if (parco::features().avx512_vbmi) tiles.push_back({"float amx emulated", float_amx_emulated});
  if (parco::features().amx) tiles.push_back({"float amx", float_amx});

  const Type types[] = {Type::fp32, Type::bf16, Type::fp16},
             scales[] = {Type::fp32, Type::bf16, Type::fp16, Type::e8m0, Type::e4m3};
  const Shape shapes[] = {{1, 37, 96, 32, 1},   {3, 16, 200, 48, 1},  {5, 33, 131, 131, 1},   {19, 65, 353, 32, 1},
                          {2, 7, 517, 160, 1},  {4, 50, 1, 1, 50},    {33, 34, 256, 128, 16}, {18, 5, 97, 16, 1},
                          {389, 70, 64, 32, 1}, {7, 35, 160, 32, 32}, {8, 18, 256, 128, 1},   {40, 200, 300, 16, 16},
                          {1, 200, 416, 32, 1}, {2, 150, 320, 16, 1}, {6, 70, 192, 64, 1},    {70, 90, 288, 288, 1}};
  int checks = 0;
  std::vector<Codes> small{listed(floats("e2m1", 2, 1, Element::listed, 0, 0), 0.5f, 12),
                           listed(floats("e2m3", 2, 3, Element::listed, 0, 0), 0.125f, 60)};
  for (int bits = 2; bits <= 8; bits++) small.push_back(integers(bits));
  const std::vector<Codes> elements{
      floats("e4m3", 4, 3, Element::e4m3, 1, 0), floats("e5m2", 5, 2, Element::e5m2, 4, 124),
      floats("e3m2", 3, 2, Element::e3m2, 0, 0), floats("e2m1", 2, 1, Element::listed, 0, 0), integers(4)};
  const auto try_both = [&](const Codes& codes, bool in_integers, Shape shape, Type x_type) {
    const bool asymmetric = checks % 2 && in_integers && codes.table.empty();
    const bool power = shape.group >= shape.columns || !(shape.group & (shape.group - 1));
    std::vector<Kernel> of_rows = power && !in_integers ? vectors : real, of_panels = in_integers ? real : vectors;
    if (!in_integers && x_type == Type::bf16)
      for (std::vector<Kernel>* kernels : {&of_rows, &of_panels})
        kernels->insert(kernels->end(), tiles.begin(), tiles.end());
    for (bool int8 : {false, true})
      if (in_integers) check(integer, integer, codes, shape, x_type, scales[checks % 5], asymmetric, true, int8);
    if (!in_integers || checks % 3 == 0)
      check(of_rows, of_panels, codes, shape, x_type, scales[checks % 5], asymmetric, false);
    checks++;
  };
  if (argc > 1) {
    const auto below = [](std::uint32_t bound) { return static_cast<std::int64_t>(random_bits() % bound); };
    for (int left = std::atoi(argv[1]); left > 0; left--) {
      Shape shape{1 + (below(4) ? below(12) : below(600)), 1 + below(90), 1 + (below(8) ? below(400) : below(5000)), 0,
                  1};
      if (below(2)) shape.columns = (shape.columns + 31) / 32 * 32;  // what packs
      shape.group = below(3) ? 16 << below(4) : below(2) ? 16 * (1 + below(20)) : shape.columns;
      if (shape.group > shape.columns) shape.group = shape.columns;
      if (below(4) == 0) shape.block_rows = 16 * (1 + below(8));
      const bool in_integers = below(2);
      const auto& from = in_integers ? small : elements;
      try_both(from[static_cast<std::size_t>(below(static_cast<std::uint32_t>(from.size())))], in_integers, shape,
               types[below(3)]);
    }
  } else {
#ifdef __SANITIZE_ADDRESS__
    constexpr int every = 2;  // all types, each with half of the shapes: sanitizers take their time
#else
    constexpr int every = 1;
#endif
    int tried = 0;
    for (const std::vector<Codes>* from : {static_cast<const std::vector<Codes>*>(&small), &elements})
      for (const Codes& codes : *from)
        for (Shape shape : shapes)
          for (Type x_type : types)
            if (tried++ % every == 0) try_both(codes, from == &small, shape, x_type);
    for (std::int64_t group : {16, 32})
      for (Shape shape : shapes) {
        const Shape own{shape.rows, shape.outputs, shape.columns, std::min(group, shape.columns), 1};
        if (parco::features().avx512) check_both("avx512", int_both_avx512, small[0], own);
        if (parco::features().avx512_vbmi) check_both("avx512_vbmi", int_both_avx512_vbmi, small[0], own);
      }
    // More columns than one sum of bytes holds.
    for (std::int64_t rows : {1, 9}) try_both(integers(8), true, {rows, 5, 66000, 66000, 1}, Type::bf16);
  }
  std::printf("%d shapes, %zu and %zu kernels, %d packed calls, %d differences\n", checks, integer.size(),
              vectors.size(), packs_tried, failures);
  return failures != 0;
}
