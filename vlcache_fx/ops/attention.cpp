// Blocked bfloat16 attention with an online softmax in float32.
//
// The algorithm is FlashAttention (arXiv 2205.14135). Query heads that share a key head form one block, so keys are
// read once per group (arXiv 2305.13245). Products use oneDNN's BRGEMM, which needs its second operand in VNNI order:
// adjacent pairs of values along the reduced dimension.

#include <torch/csrc/inductor/cpp_prefix.h>

#include <ATen/native/CPUBlas.h>

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

namespace {

using bf16 = at::BFloat16;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t BLOCK_KEYS = 256;
constexpr int64_t BLOCK_ROWS = 128;  // query rows times heads per group
constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

struct Strides {
  int64_t batch, head, row;
};

// Keys [n, dim] -> pairs along dim: [dim / 2][BLOCK_KEYS][2], padded with zeros.
void pack_keys(const bf16* keys, int64_t stride, int64_t n, int64_t dim, bf16* packed) {
  constexpr int64_t TILE = 16;  // reads stay in the L1 cache, writes fill complete cache lines
  auto* pairs = reinterpret_cast<uint32_t*>(packed);
  int64_t j = 0;
  for (; j + TILE <= n; j += TILE) {
    for (int64_t d = 0; d < dim / 2; ++d) {
      for (int64_t i = 0; i < TILE; ++i) {
        std::memcpy(pairs + d * BLOCK_KEYS + j + i, keys + (j + i) * stride + 2 * d, sizeof(uint32_t));
      }
    }
  }
  for (int64_t d = 0; d < dim / 2; ++d) {
    for (int64_t i = j; i < n; ++i) {
      std::memcpy(pairs + d * BLOCK_KEYS + i, keys + i * stride + 2 * d, sizeof(uint32_t));
    }
    std::fill(pairs + d * BLOCK_KEYS + n, pairs + (d + 1) * BLOCK_KEYS, 0u);
  }
}

// Values [n, dim] -> pairs along n: [BLOCK_KEYS / 2][dim][2], padded with zeros.
void pack_values(const bf16* values, int64_t stride, int64_t n, int64_t dim, bf16* packed) {
  for (int64_t j = 0; j < BLOCK_KEYS; j += 2) {
    const auto* even = reinterpret_cast<const uint16_t*>(values + j * stride);
    const auto* odd = even + stride;
    auto* to = reinterpret_cast<uint16_t*>(packed + j * dim);
    for (int64_t d = 0; d < dim; ++d) {
      to[2 * d] = j < n ? even[d] : 0;
      to[2 * d + 1] = j + 1 < n ? odd[d] : 0;
    }
  }
}

// One row of scores [BLOCK_KEYS] -> weights relative to the highest score so far. Returns the factor for the sums
// of earlier blocks.
float soften(float* scores, int64_t n, const bool* mask, float scale, float& highest, float& total, bf16* weights) {
  if (mask != nullptr && std::memchr(mask, 0, n) != nullptr) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(mask);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const float score = scores[j];
      scores[j] = bytes[j] != 0 ? score : MINUS_INFINITY;
    }
  }
  std::fill(scores + n, scores + BLOCK_KEYS, MINUS_INFINITY);
  Vec high(MINUS_INFINITY);
  for (int64_t j = 0; j < BLOCK_KEYS; j += Vec::size()) high = at::vec::maximum(high, Vec::loadu(scores + j));
  const float peak = scale * at::vec::vec_reduce_all<float>(
      [](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, high);
  const float before = highest;
  highest = peak < before ? before : peak;
  if (highest == MINUS_INFINITY) {
    std::fill(weights, weights + BLOCK_KEYS, bf16(0.f));
    return 1.f;
  }
  const Vec factor(scale), offset(highest);
  Vec sum(0.f);
  for (int64_t j = 0; j < BLOCK_KEYS; j += 2 * Vec::size()) {
    const Vec a = (Vec::loadu(scores + j) * factor - offset).exp_u20();
    const Vec b = (Vec::loadu(scores + j + Vec::size()) * factor - offset).exp_u20();
    sum = sum + a + b;
    at::vec::convert_from_float<bf16>(a, b).store(weights + j);
  }
  const float shrink = std::exp(before - highest);
  total = total * shrink +
      at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, sum);
  return shrink;
}

// For few lines (a line is one row of one head), packing keys and values takes longer than the products, so these
// kernels read keys and values unpacked.
#ifdef __AVX512BF16__

constexpr int64_t FEW = 16;

// Lines [lines, dim] -> pairs along dim: [dim / 2][FEW][2], padded with zeros.
void pack_lines(const bf16* from, int64_t lines, int64_t dim, bf16* packed) {
  for (int64_t d = 0; d < dim / 2; ++d) {
    for (int64_t line = 0; line < FEW; ++line) {
      for (int64_t i = 0; i < 2; ++i)
        packed[(d * FEW + line) * 2 + i] = line < lines ? from[line * dim + 2 * d + i] : bf16(0.f);
    }
  }
}

// scores[line][j] = lines . keys[j], for n keys; KEYS of them at a time hide the latency of a sum.
template <int KEYS>
void score_keys(const bf16* packed, int64_t lines, const bf16* keys, int64_t stride, int64_t dim, float* scores) {
  __m512 sums[KEYS];
  for (int j = 0; j < KEYS; ++j) sums[j] = _mm512_setzero_ps();
  for (int64_t d = 0; d < dim / 2; ++d) {
    const auto pairs = (__m512bh)_mm512_loadu_si512(packed + d * FEW * 2);
    for (int j = 0; j < KEYS; ++j) {
      int32_t pair;
      std::memcpy(&pair, keys + j * stride + 2 * d, sizeof(pair));
      sums[j] = _mm512_dpbf16_ps(sums[j], pairs, (__m512bh)_mm512_set1_epi32(pair));
    }
  }
  alignas(64) float column[KEYS][FEW];
  for (int j = 0; j < KEYS; ++j) _mm512_store_ps(column[j], sums[j]);
  for (int64_t line = 0; line < lines; ++line) {
    for (int j = 0; j < KEYS; ++j) scores[line * BLOCK_KEYS + j] = column[j][line];
  }
}

void score_few(const bf16* packed, int64_t lines, const bf16* keys, int64_t stride, int64_t n, int64_t dim,
               float* scores) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) score_keys<8>(packed, lines, keys + j * stride, stride, dim, scores + j);
  for (; j < n; ++j) score_keys<1>(packed, lines, keys + j * stride, stride, dim, scores + j);
}

// sums[line][d] += weights[line] . values[.][d], for LINES lines, 32 dimensions (or 16) and n values.
template <int LINES>
void add_values(const bf16* weights, const bf16* values, int64_t stride, int64_t n, int64_t dim, float* sums,
                int64_t width) {
  __m512 low[LINES], high[LINES];
  for (int line = 0; line < LINES; ++line) low[line] = high[line] = _mm512_setzero_ps();
  const __mmask32 there = width == 32 ? 0xffffffffu : 0xffffu;
  for (int64_t j = 0; j < n; j += 2) {
    const __m512i even = _mm512_maskz_loadu_epi16(there, values + j * stride);
    const __m512i odd = _mm512_maskz_loadu_epi16(j + 1 < n ? there : 0u, values + (j + 1) * stride);
    const auto a = (__m512bh)_mm512_unpacklo_epi16(even, odd), b = (__m512bh)_mm512_unpackhi_epi16(even, odd);
    for (int line = 0; line < LINES; ++line) {
      int32_t pair;
      std::memcpy(&pair, weights + line * BLOCK_KEYS + j, sizeof(pair));
      const auto both = (__m512bh)_mm512_set1_epi32(pair);
      low[line] = _mm512_dpbf16_ps(low[line], a, both);
      high[line] = _mm512_dpbf16_ps(high[line], b, both);
    }
  }
  // Unpacking works per 128 bits: ``low`` and ``high`` alternate every four dimensions.
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int line = 0; line < LINES; ++line) {
    float* to = sums + line * dim;
    const __m512 a = _mm512_permutex2var_ps(low[line], first, high[line]);
    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), a));
    if (width == 32) {
      const __m512 b = _mm512_permutex2var_ps(low[line], second, high[line]);
      _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), b));
    }
  }
}

void add_few(const bf16* weights, int64_t lines, const bf16* values, int64_t stride, int64_t n, int64_t dim,
             float* sums) {
  for (int64_t d = 0; d < dim; d += 32) {
    const int64_t width = std::min<int64_t>(32, dim - d);
    int64_t line = 0;
    for (; line + 8 <= lines; line += 8)
      add_values<8>(weights + line * BLOCK_KEYS, values + d, stride, n, dim, sums + line * dim + d, width);
    for (; line < lines; ++line)
      add_values<1>(weights + line * BLOCK_KEYS, values + d, stride, n, dim, sums + line * dim + d, width);
  }
}

#else

constexpr int64_t FEW = 0;

void pack_lines(const bf16*, int64_t, int64_t, bf16*) {}
void score_few(const bf16*, int64_t, const bf16*, int64_t, int64_t, int64_t, float*) {}
void add_few(const bf16*, int64_t, const bf16*, int64_t, int64_t, int64_t, float*) {}

#endif

template <typename T>
std::unique_ptr<T[]> uninitialised(int64_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

}  // namespace

// Returns whether the processor and oneDNN's settings support the kernel.
extern "C" int vlcache_attention_is_supported() {
  bf16 a[4] = {}, b[32] = {};
  float c[32] = {};
  try {
    at::native::cpublas::brgemm(2, 16, 2, 2, 16, 16, false, a, b, c, true);
    at::native::cpublas::brgemm_release(true);
    return 1;
  } catch (const std::exception&) {
    return 0;
  }
}

// query [batch, heads, rows, dim], key and value [batch, key heads, tokens, dim], mask (or null) [batch, heads,
// rows, tokens], each with its own strides in values, dense along dim and tokens; out [batch, rows, heads, dim],
// dense. If causal, row i reads tokens 0..i; with places [batch, rows], dense, tokens 0..places[i]. A row that reads
// no token becomes zero.
extern "C" void vlcache_attention(
    const bf16* query, const bf16* key, const bf16* value, const bool* mask, bf16* out, const int64_t* sizes,
    const int64_t* strides, int64_t causal, const int64_t* places, float scale) {
  const int64_t batch = sizes[0], heads = sizes[1], key_heads = sizes[2], rows = sizes[3], tokens = sizes[4],
                dim = sizes[5];
  const auto stride = [&](int64_t i) { return Strides{strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]}; };
  const Strides q = stride(0), k = stride(1), v = stride(2), m = stride(3);
  const int64_t group = heads / key_heads;
  const int64_t rows_per_block = std::max<int64_t>(1, BLOCK_ROWS / group), most = rows_per_block * group;
  const int64_t key_blocks = (tokens + BLOCK_KEYS - 1) / BLOCK_KEYS;
  const int64_t row_blocks = (rows + rows_per_block - 1) / rows_per_block;
  const int64_t packed_size = BLOCK_KEYS * dim;
  const auto block_of = [&](const bf16* from, const Strides& s, int64_t bh, int64_t first) {
    return from + bh / key_heads * s.batch + bh % key_heads * s.head + first * s.row;
  };
  const bool is_few = std::min(rows, rows_per_block) * group <= FEW;
  const int64_t packed_blocks = is_few ? 0 : key_blocks;
  const auto keys = uninitialised<bf16>(batch * key_heads * packed_blocks * packed_size);
  const auto values = uninitialised<bf16>(batch * key_heads * packed_blocks * packed_size);

#pragma omp parallel
  {
#pragma omp for collapse(2)
    for (int64_t bh = 0; bh < batch * key_heads; ++bh) {
      for (int64_t n = 0; n < packed_blocks; ++n) {
        const int64_t first = n * BLOCK_KEYS, at = (bh * key_blocks + n) * packed_size;
        const int64_t length = std::min(BLOCK_KEYS, tokens - first);
        pack_keys(block_of(key, k, bh, first), k.row, length, dim, keys.get() + at);
        pack_values(block_of(value, v, bh, first), v.row, length, dim, values.get() + at);
      }
    }

    const auto scores = uninitialised<float>(most * BLOCK_KEYS), sums = uninitialised<float>(most * dim);
    const auto highest = uninitialised<float>(most), total = uninitialised<float>(most);
    const auto weights = uninitialised<bf16>(most * BLOCK_KEYS), gathered = uninitialised<bf16>(most * dim);
    const auto packed = uninitialised<bf16>(is_few ? FEW * dim : 0);
    const auto ends = uninitialised<int64_t>(rows_per_block);  // per row, the end of the tokens that it reads
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (int64_t bh = 0; bh < batch * key_heads; ++bh) {
      for (int64_t t = 0; t < row_blocks; ++t) {
        const int64_t b = bh / key_heads, first_head = bh % key_heads * group, first_row = t * rows_per_block;
        const int64_t count = std::min(rows_per_block, rows - first_row), lines = count * group;
        const auto mask_line = [&](int64_t line, int64_t first) {
          return mask + b * m.batch + (first_head + line / count) * m.head + (first_row + line % count) * m.row + first;
        };
        for (int64_t line = 0; line < lines; ++line) {
          const int64_t head = first_head + line / count, row = first_row + line % count;
          std::memcpy(gathered.get() + line * dim, query + b * q.batch + head * q.head + row * q.row,
                      dim * sizeof(bf16));
        }
        if (is_few) pack_lines(gathered.get(), lines, dim, packed.get());
        for (int64_t i = 0; i < count; ++i) {
          const int64_t row = first_row + i;
          ends[i] = places != nullptr ? std::clamp<int64_t>(places[b * rows + row], -1, tokens - 1) + 1
                    : causal          ? std::min(row + 1, tokens)
                                      : tokens;
        }
        const int64_t end = *std::max_element(ends.get(), ends.get() + count);
        std::fill(sums.get(), sums.get() + lines * dim, 0.f);
        std::fill(highest.get(), highest.get() + lines, MINUS_INFINITY);
        std::fill(total.get(), total.get() + lines, 0.f);

        for (int64_t n = 0; n < key_blocks; ++n) {
          const int64_t first = n * BLOCK_KEYS, length = std::min(BLOCK_KEYS, tokens - first);
          if (first >= end) break;
          if (mask != nullptr) {
            const int64_t distinct = m.head == 0 ? count : lines;
            bool any = false;
            for (int64_t line = 0; line < distinct && !any; ++line)
              any = std::memchr(mask_line(line, first), 1, length) != nullptr;
            if (!any) continue;
          }
          const int64_t at = (bh * key_blocks + n) * packed_size;
          if (is_few) {
            score_few(packed.get(), lines, block_of(key, k, bh, first), k.row, length, dim, scores.get());
          } else {
            at::native::cpublas::brgemm(lines, BLOCK_KEYS, dim, dim, BLOCK_KEYS, BLOCK_KEYS, false, gathered.get(),
                                        keys.get() + at, scores.get(), true);
          }
          for (int64_t line = 0; line < lines; ++line) {
            const int64_t readable = std::clamp<int64_t>(ends[line % count] - first, 0, length);
            const bool* allowed = mask == nullptr ? nullptr : mask_line(line, first);
            const float shrink = soften(scores.get() + line * BLOCK_KEYS, readable, allowed, scale, highest[line],
                                        total[line], weights.get() + line * BLOCK_KEYS);
            if (shrink != 1.f) {
              float* sum = sums.get() + line * dim;
              for (int64_t d = 0; d < dim; d += Vec::size()) (Vec::loadu(sum + d) * Vec(shrink)).store(sum + d);
            }
          }
          if (is_few) {
            add_few(weights.get(), lines, block_of(value, v, bh, first), v.row, length, dim, sums.get());
          } else {
            at::native::cpublas::brgemm(lines, dim, BLOCK_KEYS, BLOCK_KEYS, dim, dim, true, weights.get(),
                                        values.get() + at, sums.get(), true);
          }
        }
        for (int64_t line = 0; line < lines; ++line) {
          const int64_t head = first_head + line / count, row = first_row + line % count;
          const float share = total[line] == 0.f ? 0.f : 1.f / total[line];
          bf16* to = out + ((b * rows + row) * heads + head) * dim;
          for (int64_t d = 0; d < dim; ++d) to[d] = bf16(sums[line * dim + d] * share);
        }
      }
    }
    at::native::cpublas::brgemm_release(true);
  }
}
