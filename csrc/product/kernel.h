// Products of large matrices: arguments and the table of CPU kernels.
#pragma once

#include "common/platform.h"
#include "common/select.h"

namespace gi {

// A factor of a product, [batch, sums, ., .], any strides.
struct ProductFactor {
  const void* data;
  Dtype dtype;
  i64 batch, sum;    // strides; zero for a matrix that is used again
  i64 outer, depth;  // strides of the row of A or the column of B, and of the summed index
};

// C[i] = sum_s A[i,s] B[i,s], or C[i] += ..., for each i of the batch.
struct Product {
  i64 batch, sums, rows, columns, depth;
  ProductFactor a, b;
  void* c;               // in the factors' accumulation type
  i64 c_batch, c_row;  // strides; columns are contiguous
  bool add;
  i64 item_rows, item_columns;  // of one piece of work; they do not change the result
};

struct ProductKernels {
  i64 (*items)(const Product&);
  void (*multiply)(const Product&, i64 begin, i64 end);
};

}  // namespace gi

GI_DECLARE_PRODUCT_KERNELS(ProductKernels, product_kernels)
