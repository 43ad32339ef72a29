// Every instruction set of the casts against the generic one, bit for bit, on odd shapes at odd addresses in buffers of
// exactly their size; built with sanitizers too.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cast/decode.h"
#include "cast/digits.h"
#include "cast/fingerprint.h"
#include "machine/features.h"

using namespace parco::cast;
using parco::linear::size_of;

namespace {

struct Kernels {
  const char* name;
  void (*cast)(const CastCall&);
  void (*amax)(const AmaxCall&);
  void (*greatest)(const AmaxCall&);
  void (*decode)(const DecodeCall&);
  void (*tiles)(const TilesCall&);
};

// Bytes at an odd address; freed as one block, so the sanitizer knows both ends.
struct Bytes {
  explicit Bytes(std::size_t count) : block(count + 1), data(block.data() + 1) {}
  std::vector<char> block;
  char* data;
};

int failures = 0;
std::mt19937 random_bits(22);

// Patterns of all kinds: mostly of ordinary size, some of any bits at all.
void fill(Bytes& to, std::int64_t count, Type type) {
  for (std::int64_t i = 0; i < count; i++) {
    std::uint32_t bits = random_bits();
    if (random_bits() % 8) bits = (bits & 0x807fffff) | (120 + random_bits() % 12) << 23;
    const std::uint16_t half = static_cast<std::uint16_t>(random_bits() % 8 ? 0x2c00 + (bits & 0x8fff) : bits);
    if (type == Type::fp32)
      std::memcpy(to.data + 4 * i, &bits, 4);
    else if (type == Type::bf16)
      std::memcpy(to.data + 2 * i, reinterpret_cast<const char*>(&bits) + 2, 2);
    else if (type == Type::fp16)
      std::memcpy(to.data + 2 * i, &half, 2);
    else
      to.data[i] = static_cast<char>(bits);
  }
}

void check(const std::vector<Kernels>& kernels, CastCall call, const char* what) {
  const std::int64_t groups = (call.columns + call.group - 1) / call.group;
  const std::int64_t down = (call.rows + call.block_rows - 1) / call.block_rows;
  const std::int64_t row_bytes = (call.columns * call.bits + 7) / 8;
  Bytes x(call.rows * call.columns * size_of(call.x_type)), scale(down * groups * size_of(call.scale_type));
  Bytes zero(down * groups);
  fill(x, call.rows * call.columns, call.x_type);
  fill(scale, down * groups, call.scale_type);
  for (std::int64_t i = 0; i < down * groups; i++)
    zero.data[i] = static_cast<char>(random_bits() & ((1 << call.bits) - 1));
  call.x = x.data;
  call.scale = scale.data;
  call.scale_stride = groups;
  call.x_stride = call.columns, call.code_stride = row_bytes;
  if (call.zero) call.zero = reinterpret_cast<const std::uint8_t*>(zero.data);
  std::string first, first_amax;
  for (const Kernels& kernel : kernels) {
    for (int threads : {1, 3}) {
      Bytes codes(call.rows * row_bytes);
      std::vector<float> amax(call.rows * groups);
      call.codes = reinterpret_cast<std::uint8_t*>(codes.data);
      call.threads = threads;
      kernel.cast(call);
      kernel.amax({call.x, amax.data(), call.rows, call.columns, call.group, threads, call.x_type});
      amax.push_back(0);
      kernel.greatest({call.x, &amax.back(), call.rows, call.columns, call.group, threads, call.x_type});
      const std::string found(codes.data, call.rows * row_bytes);
      const std::string found_amax(reinterpret_cast<const char*>(amax.data()), amax.size() * sizeof(float));
      if (first.empty()) first = found, first_amax = found_amax;
      if (found == first && found_amax == first_amax) continue;
      failures++;
      std::printf("%s of %s: rows %ld columns %ld group %ld rounding %d x_type %d scale_type %d threads %d\n",
                  kernel.name, what, static_cast<long>(call.rows), static_cast<long>(call.columns),
                  static_cast<long>(call.group), static_cast<int>(call.rounding), static_cast<int>(call.x_type),
                  static_cast<int>(call.scale_type), threads);
    }
  }
}

// Any bytes as codes of `like`'s shape and scales, to numbers of its x_type.
void check_decode(const std::vector<Kernels>& kernels, const CastCall& like, const char* what) {
  const std::int64_t groups = (like.columns + like.group - 1) / like.group;
  const std::int64_t down = (like.rows + like.block_rows - 1) / like.block_rows;
  Bytes codes(like.rows * ((like.columns * like.bits + 7) / 8)), scale(down * groups * size_of(like.scale_type));
  Bytes zero(down * groups);
  for (Bytes* bytes : {&codes, &zero})
    for (char* byte = bytes->data; byte < bytes->block.data() + bytes->block.size(); byte++)
      *byte = static_cast<char>(random_bits());
  fill(scale, down * groups, like.scale_type);
  std::vector<float> values;
  const bool is_integer = like.kind == Kind::integer;
  for (int i = 0; i < 1 << like.bits; i++)
    values.push_back(is_integer ? static_cast<float>(i - like.offset) : i * 0.37f);
  const bool is_e4m3 = like.kind == Kind::floating && like.mantissa_bits == 3 && like.bits == 8;
  if (like.kind == Kind::floating && like.bits == 8 && !is_e4m3) return;  // needs the table of its pattern
  if (is_e4m3)
    for (int i = 0; i < 256; i++) {
      const int exponent = i >> 3 & 15, mantissa = i & 7;
      const float magnitude =
          i % 128 == 127 ? NAN : std::ldexp(exponent ? 8.0f + mantissa : mantissa, std::max(exponent, 1) - 10);
      values[i] = i & 128 ? -magnitude : magnitude;
    }
  DecodeCall call{};
  call.codes = reinterpret_cast<const std::uint8_t*>(codes.data), call.values = values.data();
  call.scale = like.rescaling == Rescaling::none ? nullptr : scale.data;
  call.zero = like.zero ? reinterpret_cast<const std::uint8_t*>(zero.data) : nullptr;
  call.factor = like.factor;
  call.rows = like.rows, call.columns = like.columns, call.group = like.group, call.block_rows = like.block_rows;
  call.scale_stride = groups, call.bits = like.bits, call.offset = like.offset;
  call.pattern = is_integer ? Pattern::integer : is_e4m3 ? Pattern::e4m3 : Pattern::none;
  call.y_type = like.x_type, call.scale_type = like.scale_type;
  std::vector<float> first;
  for (const Kernels& kernel : kernels) {
    for (int threads : {1, 3}) {
      Bytes y(call.rows * call.columns * size_of(call.y_type));
      call.y = y.data, call.threads = threads;
      kernel.decode(call);
      std::vector<float> found;
      for (std::int64_t i = 0; i < call.rows * call.columns; i++) {
        std::uint32_t bits = 0;
        std::memcpy(&bits, y.data + i * size_of(call.y_type), size_of(call.y_type));
        const std::uint32_t infinity = call.y_type == Type::fp32   ? 0x7f800000
                                       : call.y_type == Type::bf16 ? 0x7f80
                                                                   : 0x7c00;
        const std::uint32_t magnitude = bits & (call.y_type == Type::fp32 ? 0x7fffffff : 0x7fff);
        found.push_back(magnitude > infinity ? -1.0f : static_cast<float>(bits >> 8) + (bits & 255) / 256.0f);
      }
      if (first.empty()) first = found;
      if (found == first) continue;
      failures++;
      std::printf("decode %s of %s: columns %ld group %ld y_type %d scale_type %d\n", kernel.name, what,
                  static_cast<long>(call.columns), static_cast<long>(call.group), static_cast<int>(call.y_type),
                  static_cast<int>(call.scale_type));
    }
  }
}

// `like` by rows and transposed, transformed where the shape allows it.
void check_tiles(const std::vector<Kernels>& kernels, const CastCall& like, const char* what) {
  const auto bytes = [&](std::int64_t columns) { return (columns * like.bits + 7) / 8; };
  const auto groups = [&](std::int64_t columns) { return (columns + like.group - 1) / like.group; };
  Bytes x(like.rows * like.columns * size_of(like.x_type));
  fill(x, like.rows * like.columns, like.x_type);
  std::vector<float> signs;
  for (int i = 0; i < 32; i++) signs.push_back(random_bits() % 2 ? 0.25f : -0.25f);
  std::string first;
  for (const Kernels& kernel : kernels) {
    for (int threads : {1, 3}) {
      Bytes codes(like.rows * bytes(like.columns)), turned(like.columns * bytes(like.rows));
      Bytes scale(like.rows * groups(like.columns) * size_of(like.scale_type));
      Bytes turned_scale(like.columns * groups(like.rows) * size_of(like.scale_type));
      TilesCall call{like, like, like.columns % 32 ? 0 : 32, like.rows % 32 ? 0 : 32, signs.data()};
      call.rows.x = call.columns.x = x.data, call.rows.threads = threads;
      call.rows.x_stride = like.columns, call.columns.x_stride = like.rows;
      call.columns.rows = like.columns, call.columns.columns = like.rows;
      call.rows.codes = reinterpret_cast<std::uint8_t*>(codes.data), call.rows.code_stride = bytes(like.columns);
      call.columns.codes = reinterpret_cast<std::uint8_t*>(turned.data), call.columns.code_stride = bytes(like.rows);
      call.rows.scale = scale.data, call.rows.scale_stride = groups(like.columns);
      call.columns.scale = turned_scale.data, call.columns.scale_stride = groups(like.rows);
      kernel.tiles(call);
      // The sign of a sum of NaNs is the compiler's choice.
      for (const Bytes* part : {&codes, &turned})
        for (std::size_t i = 0; like.kind == Kind::floating && like.bits == 8 && i + 1 < part->block.size(); i++)
          if ((part->data[i] & 127) == like.nan_code) part->data[i] &= 127;
      std::string found;
      for (const Bytes* part : {&codes, &turned, &scale, &turned_scale})
        found.append(part->data, part->block.size() - 1);
      if (first.empty()) first = found;
      if (found == first) continue;
      failures++;
      std::printf("tiles %s of %s: rows %ld columns %ld\n", kernel.name, what, static_cast<long>(like.rows),
                  static_cast<long>(like.columns));
    }
  }
}

// Every byte of five digits as ten bits and back, at every length of a row.
void check_digits() {
  for (std::int64_t columns = 1; columns < 60; columns++)
    for (int threads : {1, 2}) {
      const std::int64_t rows = 2600, wide = (columns + 4) / 5, narrow = (columns + 3) / 4;
      Bytes digits(rows * wide), bits(rows * narrow), again(rows * wide);
      for (std::int64_t i = 0; i < rows * wide; i++) digits.data[i] = static_cast<char>(i / wide + i);
      const auto at = [](Bytes& bytes, std::int64_t i) { return static_cast<std::uint8_t>(bytes.data[i]); };
      digits_to_bits(reinterpret_cast<std::uint8_t*>(digits.data), reinterpret_cast<std::uint8_t*>(bits.data), rows,
                     columns, threads);
      bits_to_digits(reinterpret_cast<std::uint8_t*>(bits.data), reinterpret_cast<std::uint8_t*>(again.data), rows,
                     columns, threads);
      for (std::int64_t n = 0; n < rows; n++)
        for (std::int64_t k = 0; k < 4 * narrow; k++) {
          int left = k < columns ? at(digits, n * wide + k / 5) % 243 : 0;
          int written = k < columns ? at(again, n * wide + k / 5) : 0;
          for (std::int64_t i = 0; i < k % 5; i++) left /= 3, written /= 3;
          const int code = at(bits, n * narrow + k / 4) >> k % 4 * 2 & 3;
          if (code != left % 3 || code != written % 3) failures++;
        }
    }
}

// Other bytes, and more of them, have other fingerprints; threads do not matter.
void check_fingerprint() {
  for (std::int64_t count : {0, 1, 7, 8, 31, 32, 33, 100, 3000001}) {
    Bytes bytes(count);
    for (std::int64_t i = 0; i < count; i++) bytes.data[i] = static_cast<char>(i * 37 + i / 251);
    std::uint8_t* data = reinterpret_cast<std::uint8_t*>(bytes.data);
    const std::uint64_t found = fingerprint(data, count, 1);
    if (fingerprint(data, count, 3) != found || (count && fingerprint(data, count - 1, 1) == found)) failures++;
    for (std::int64_t i = 0; i < count; i += 1 + count / 97) {
      data[i] ^= 128;
      if (fingerprint(data, count, 1) == found) failures++;
      data[i] ^= 128;
    }
  }
}

}  // namespace

int main() {
  std::vector<Kernels> kernels{
      {"generic", cast_generic, amax_generic, greatest_generic, decode_generic, tiles_generic}};
  if (parco::features().avx2) kernels.push_back({"avx2", cast_avx2, amax_avx2, greatest_avx2, decode_avx2, tiles_avx2});
  if (parco::features().avx512)
    kernels.push_back({"avx512", cast_avx512, amax_avx512, greatest_avx512, decode_avx512, tiles_avx512});
  std::vector<float> entries;
  for (int i = 0; i < 16; i++) entries.push_back(std::ldexp(static_cast<float>(i * i * i) - 1000.0f, -10));
  const std::uint8_t some = 0;
  struct Element {
    const char* name;
    Kind kind;
    int bits, mantissa_bits, least_exponent, max_code, nan_code, least, greatest, offset;
    bool zero;
  };
  const Element elements[] = {
      {"e4m3", Kind::floating, 8, 3, -6, 126, 127, 0, 0, 0, false},
      {"e5m2", Kind::floating, 8, 2, -14, 123, 126, 0, 0, 0, false},
      {"e3m2", Kind::floating, 6, 2, -2, 31, -1, 0, 0, 0, false},
      {"e2m3", Kind::floating, 6, 3, 0, 31, -1, 0, 0, 0, false},
      {"e2m1", Kind::floating, 4, 1, 0, 7, -1, 0, 0, 0, false},
      {"int8", Kind::integer, 8, 0, 0, 0, 0, -127, 127, 128, false},
      {"int5 from a zero", Kind::integer, 5, 0, 0, 0, 0, -16, 15, 16, true},
      {"int3", Kind::integer, 3, 0, 0, 0, 0, -4, 3, 4, false},
      {"ternary", Kind::integer, 2, 0, 0, 0, 0, -1, 1, 1, false},
      {"listed", Kind::listed, 4, 0, 0, 0, 0, 0, 0, 0, false},
  };
  const struct {
    std::int64_t rows, columns, group, block_rows;
  } shapes[] = {{1, 1, 1, 1},       {3, 17, 17, 1},     {5, 300, 32, 1},    {7, 513, 48, 1},
                {33, 64, 64, 16},   {2, 1000, 1, 2},    {40, 257, 128, 40}, {4, 96, 96, 1},
                {3, 2085, 2085, 1}, {2, 4100, 2048, 1}, {5, 540, 16, 1},    {300, 288, 32, 1}};
  const Type types[] = {Type::fp32, Type::bf16, Type::fp16};
  const Type scales[] = {Type::fp32, Type::bf16, Type::fp16, Type::e8m0, Type::e4m3};
  const float factor = 0.3f;
  int checks = 0, tiles = 0;
  for (const Element& element : elements)
    for (const auto& shape : shapes)
      for (int rounding = 0; rounding < 3; rounding++)
        for (Type x_type : types) {
          CastCall call{};
          call.rows = shape.rows, call.columns = shape.columns, call.group = shape.group;
          call.block_rows = shape.block_rows;
          call.seed = 0x123456789abcdefull;
          call.kind = element.kind;
          call.rounding = static_cast<Rounding>(rounding);
          call.rescaling = static_cast<Rescaling>(checks % 3);
          call.factor = checks % 2 ? &factor : nullptr;
          call.entries = entries.data();
          call.bits = element.bits, call.mantissa_bits = element.mantissa_bits;
          call.least_exponent = element.least_exponent, call.max_code = element.max_code;
          call.nan_code = element.nan_code, call.least = element.least, call.greatest = element.greatest;
          call.offset = element.offset;
          call.zero = element.zero ? &some : nullptr;
          call.x_type = x_type;
          call.scale_type = scales[checks % 5];
          call.largest = 6.0f, call.greatest_exponent = 2;
          if (call.block_rows == 1 && checks % 4 == 0) {
            call.rule = call.scale_type == Type::e8m0   ? static_cast<Rule>(2 + checks / 4 % 4)
                        : call.scale_type == Type::e4m3 ? Rule::e4m3
                                                        : Rule::absmax;
            call.factor = call.rule == Rule::e4m3 ? &factor : nullptr;
            call.rescaling = call.rule == Rule::absmax ? Rescaling::divide : Rescaling::multiply;
          }
          check(kernels, call, element.name);
          check_decode(kernels, call, element.name);
          const bool within_a_row = !call.zero && call.rule != Rule::given && call.group % 16 == 0 && call.group <= 256;
          if (within_a_row && 256 % call.group == 0) check_tiles(kernels, call, element.name), tiles++;
          checks++;
        }
  check_digits();
  check_fingerprint();
  std::printf("%d casts, %d by tiles, %zu kernels, %d differences\n", checks, tiles, kernels.size(), failures);
  return failures != 0;
}
