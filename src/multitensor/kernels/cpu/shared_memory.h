/* What CPU ranks need that share memory: sums in rank order, waiting and waking. Included by native.c only. */

/* dst = sources[0] + sources[1] + ..., added in that order, n floats each; dst may be one of them. */
EXPORT void mt_reduce_sum_f32(float *dst, const float *const *sources, int64_t n_sources, int64_t n)
{
    const kernel_table *table = level_table(mt_best_level());
    float sum[1024];
    for (int64_t i = 0; i < n; i += 1024) {
        int64_t count = min_int(1024, n - i);
        memset(sum, 0, sizeof sum);
        if (n_sources > 0)
            memcpy(sum, sources[0] + i, (size_t)count * sizeof(float));
        for (int64_t s = 1; s < n_sources; s++)
            table->add(sum, sources[s] + i, count);
        memcpy(dst + i, sum, (size_t)count * sizeof(float));
    }
}

/* Returns 1 once *address has reached `value` (as a counter that may wrap: at most 2**31 - 1 ahead), 0 after timeout_ms
 * (negative: never). Spins for spin_us, then sleeps; mt_post wakes sleepers, and without it a sleeper looks every
 * millisecond. The address may be shared between processes. */
EXPORT int mt_wait_until(atomic_uint *address, uint32_t value, int64_t spin_us, int64_t timeout_ms)
{
    int64_t start = now_ns(), spin_until = start + spin_us * 1000;
    int64_t deadline = timeout_ms < 0 ? INT64_MAX : start + timeout_ms * 1000000;
    for (int i = 1;; i++) {
        uint32_t seen = atomic_load_explicit(address, memory_order_acquire);
        if ((int32_t)(seen - value) >= 0)
            return 1;
        if (i % 32) {
            cpu_relax();
            continue;
        }
        int64_t now = now_ns();
        if (now >= deadline)
            return 0;
        if (now < spin_until)
            continue;
        struct timespec pause = {0, (long)min_int(1000000, deadline - now)};
#if defined(__linux__)
        syscall(SYS_futex, address, FUTEX_WAIT, seen, &pause, NULL, 0);
#else
        nanosleep(&pause, NULL);
#endif
    }
}

/* *address = value, visible after everything written before, and wakes those who wait for it. */
EXPORT void mt_post(atomic_uint *address, uint32_t value)
{
    atomic_store_explicit(address, value, memory_order_release);
#if defined(__linux__)
    syscall(SYS_futex, address, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
#endif
}
