// What finishes a reduction, in one order: the same bits every time, for any number of threads.
#include "abi.h"

// Of the rows of x (rows, n): their sums, of row `maximum` the largest or 0.
extern "C" void fastppo_sum_rows(
    const float* x, int64_t stride, int64_t rows, int64_t n, int64_t maximum, float* out) {
  for (int64_t row = 0; row < rows; row++) {
    const float* from = x + row * stride;
    double total = 0;
    for (int64_t i = 0; i < n; i++) {
      if (row == maximum) {
        total = from[i] > total || from[i] != from[i] ? from[i] : total;
      } else {
        total += from[i];
      }
    }
    out[row] = (float)total;
  }
}
