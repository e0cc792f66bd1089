/* Closes a level: its table. Included last by level_*.c. */
const kernel_table TABLE = {
    .name = TABLE_NAME,
    .gemv_tokens = GEMV_TOKENS,
    .quantize = quantize_row,
    .multiply_fast = multiply_fast,
    .multiply_exact = multiply_exact,
    .dequantize = dequantize_row,
    .gated_activation = gated_activation,
    .rms_norm = rms_norm,
    .add = add,
    .rope = rope,
    .to_cache = to_cache,
    .attend = attend,
    .attend_merge = attend_merge,
};
