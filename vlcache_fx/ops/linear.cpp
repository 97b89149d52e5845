// Few rows of bfloat16 times a weight matrix: every weight is read once, in the order in which it lies in memory.
//
// Such a product takes as long as reading its weights. PyTorch's reads tiles of them, at about half the rate.

#include <torch/csrc/inductor/cpp_prefix.h>

#include <immintrin.h>

#include <algorithm>

namespace {

using bf16 = at::BFloat16;

constexpr int64_t MOST_ROWS = 6;
constexpr int64_t LINES = 32;  // weight rows of one task

#ifdef __AVX512BF16__

constexpr int64_t PAIR = 64;  // values that two registers hold; two chains of sums hide how long one takes

__m512bh load(const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }

__m512bh load_first(const bf16* from, int64_t count) {
  return (__m512bh)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1), from);
}

// out[r][j] = sum over i of rows[r][i] * weight[j][i], plus bias[j]; sums in float32.
template <int ROWS>
void multiply(const bf16* rows, const bf16* weight, const bf16* bias, bf16* out, int64_t first, int64_t last,
              int64_t width, int64_t outputs) {
  for (int64_t j = first; j < last; ++j) {
    const bf16* line = weight + j * width;
    __m512 even[ROWS], odd[ROWS];
    for (int r = 0; r < ROWS; ++r) even[r] = odd[r] = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + PAIR <= width; i += PAIR) {
      const __m512bh a = load(line + i), b = load(line + i + PAIR / 2);
      for (int r = 0; r < ROWS; ++r) {
        even[r] = _mm512_dpbf16_ps(even[r], a, load(rows + r * width + i));
        odd[r] = _mm512_dpbf16_ps(odd[r], b, load(rows + r * width + i + PAIR / 2));
      }
    }
    for (; i < width; i += PAIR / 2) {
      const int64_t count = std::min(width - i, PAIR / 2);
      const __m512bh a = load_first(line + i, count);
      for (int r = 0; r < ROWS; ++r) even[r] = _mm512_dpbf16_ps(even[r], a, load_first(rows + r * width + i, count));
    }
    for (int r = 0; r < ROWS; ++r) {
      const float sum = _mm512_reduce_add_ps(_mm512_add_ps(even[r], odd[r]));
      out[r * outputs + j] = bf16(bias == nullptr ? sum : sum + float(bias[j]));
    }
  }
}

using Multiply = decltype(&multiply<1>);
constexpr Multiply MULTIPLY[MOST_ROWS] = {multiply<1>, multiply<2>, multiply<3>,
                                          multiply<4>, multiply<5>, multiply<6>};

#endif

}  // namespace

// Whether this was compiled for a processor that multiplies bfloat16.
extern "C" int vlcache_linear_serves() {
#ifdef __AVX512BF16__
  return 1;
#else
  return 0;
#endif
}

// rows [count, width], weight [outputs, width], bias (or null) [outputs] -> out [count, outputs], all dense;
// count is 1 to MOST_ROWS.
extern "C" void vlcache_linear(const bf16* rows, const bf16* weight, const bf16* bias, bf16* out, int64_t count,
                               int64_t width, int64_t outputs) {
#ifdef __AVX512BF16__
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < (outputs + LINES - 1) / LINES; ++task) {
    const int64_t first = task * LINES;
    MULTIPLY[count - 1](rows, weight, bias, out, first, std::min(outputs, first + LINES), width, outputs);
  }
#endif
}
