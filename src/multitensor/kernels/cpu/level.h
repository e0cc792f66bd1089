/* Everything of one level, over the vector primitives that the including level_*.c has defined; ends with its table.
 *
 * Fast: weight = scale[g] * code + minimum[g], activation = d[g] * q, both per scale group g, so a product is
 *     sum over g of scale[g] * d[g] * (integer dot product) + minimum[g] * sum[g],   sum[g] = d[g] * (sum of q).
 * The groups' terms go to LANES sums in turn, these are added by halves, and TILE_COLS columns at a time to the bias: in
 * this order for any number of tokens, so that a token's result does not depend, not by a bit, on its company. (Equal
 * but for the last digit is not enough: some activation of the next layer then rounds the other way.)
 * Exact: weights become floats in ggml's own order of operations and meet float activations.
 * Few tokens: a row is decoded (in registers for one token) and multiplied by all tokens. Many: a tile of rows is
 * decoded and packed so that a vector holds one column of all its rows, and meets broadcast activations. */

#include "weights.h"
#include "rows.h"
#include "tiles.h"
#include "matmul.h"
#include "transformer.h"
#include "attention.h"

const kernel_table TABLE = {
    .name = TABLE_NAME,
    .quantize = quantize_row,
    .multiply_fast = multiply_fast,
    .multiply_exact = multiply_exact,
    .dequantize = dequantize_row,
    .gated_activation = gated_activation,
    .rms_norm = rms_norm,
    .add = add,
    .rope = rope,
    .to_cache = to_cache,
    .to_codes = to_codes,
    .attend = attend,
    .attend_merge = attend_merge,
};
