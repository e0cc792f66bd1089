/* A few threads that share the chunks of one job at a time with the thread that calls. Included by native.c only.
 *
 * Workers that find nothing to do spin for a while, since in a decode step the next job is microseconds away, and then
 * sleep. A job does not wait for workers to arrive: who comes takes chunks, and the caller waits only for those that
 * have come in. So on a crowded machine the caller just does more of the work itself. */
#ifndef MULTITENSOR_POOL_H
#define MULTITENSOR_POOL_H

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define MAX_THREADS 256

typedef void (*chunk_function)(void *job, int64_t chunk, void *scratch);

typedef struct pool pool;

typedef struct {
    pool *owner;
    int index;
    pthread_t thread;
} worker;

struct pool {
    int threads; /* the caller included */
    int started; /* workers running */
    int64_t spin_ns;
    pid_t pid;
    void *scratch[MAX_THREADS];
    int64_t scratch_bytes;
    /* The job under way, written only while no worker is inside. */
    chunk_function function;
    void *job;
    int64_t chunks;
    _Alignas(64) atomic_long next; /* chunk */
    _Alignas(64) atomic_uint generation; /* odd while a job is open */
    _Alignas(64) atomic_int inside;      /* workers that may be running chunks */
    _Alignas(64) atomic_int sleepers;
    atomic_int stop;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    worker workers[MAX_THREADS];
};

static inline void cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void run_chunks(pool *p, int index)
{
    for (;;) {
        int64_t chunk = atomic_fetch_add_explicit(&p->next, 1, memory_order_relaxed);
        if (chunk >= p->chunks)
            return;
        p->function(p->job, chunk, p->scratch[index]);
    }
}

/* Returns when the generation is no longer `seen` (a job opened or closed), or on stop. */
static void wait_for_job(pool *p, unsigned seen)
{
    int64_t deadline = now_ns() + p->spin_ns;
    for (int i = 1; atomic_load(&p->generation) == seen && !atomic_load(&p->stop); i++) {
        cpu_relax();
        if (i % 64 || now_ns() < deadline)
            continue;
        pthread_mutex_lock(&p->mutex);
        /* The caller opens a job first and looks for sleepers second, we the other way round: one sees the other. */
        atomic_fetch_add(&p->sleepers, 1);
        while (atomic_load(&p->generation) == seen && !atomic_load(&p->stop))
            pthread_cond_wait(&p->wake, &p->mutex);
        atomic_fetch_sub(&p->sleepers, 1);
        pthread_mutex_unlock(&p->mutex);
    }
}

static void *worker_main(void *argument)
{
    worker *self = argument;
    pool *p = self->owner;
    unsigned seen = 0;
    while (!atomic_load(&p->stop)) {
        unsigned generation = atomic_load(&p->generation);
        if (generation == seen || !(generation & 1)) {
            seen = generation;
            wait_for_job(p, seen);
            continue;
        }
        seen = generation;
        /* Come in first and look again second; the caller closes first and counts second: one sees the other. */
        atomic_fetch_add(&p->inside, 1);
        if (atomic_load(&p->generation) == generation)
            run_chunks(p, self->index);
        atomic_fetch_sub(&p->inside, 1);
    }
    return NULL;
}

/* Runs chunks 0 .. chunks - 1 of a job, on all threads if `parallel`, and returns when all are done. */
static void pool_run(pool *p, chunk_function function, void *job, int64_t chunks, int parallel)
{
    if (!parallel || chunks < 2 || p->started == 0 || getpid() != p->pid) { /* threads do not survive a fork */
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            function(job, chunk, p->scratch[0]);
        return;
    }
    p->function = function;
    p->job = job;
    p->chunks = chunks;
    atomic_store_explicit(&p->next, 0, memory_order_relaxed);
    atomic_fetch_add(&p->generation, 1); /* open */
    if (atomic_load(&p->sleepers)) {
        pthread_mutex_lock(&p->mutex);
        pthread_cond_broadcast(&p->wake);
        pthread_mutex_unlock(&p->mutex);
    }
    run_chunks(p, 0);
    atomic_fetch_add(&p->generation, 1); /* closed */
    for (int i = 1; atomic_load(&p->inside); i++) {
        cpu_relax();
        if (i % 1024 == 0)
            sched_yield(); /* a worker was taken off its core in the middle of a chunk */
    }
}

/* Every thread gets at least `bytes` of scratch. Returns 0, or -1 without memory (what was there stays). */
static int pool_reserve(pool *p, int64_t bytes)
{
    if (bytes <= p->scratch_bytes)
        return 0;
    for (int i = 0; i < p->threads; i++) {
        void *bigger = NULL;
        if (posix_memalign(&bigger, 64, (size_t)bytes))
            return -1;
        free(p->scratch[i]);
        p->scratch[i] = bigger;
    }
    p->scratch_bytes = bytes;
    return 0;
}

static void pool_stop(pool *p)
{
    if (getpid() == p->pid) {
        atomic_store(&p->stop, 1);
        pthread_mutex_lock(&p->mutex);
        pthread_cond_broadcast(&p->wake);
        pthread_mutex_unlock(&p->mutex);
        for (int i = 0; i < p->started; i++)
            pthread_join(p->workers[i].thread, NULL);
        pthread_cond_destroy(&p->wake);
        pthread_mutex_destroy(&p->mutex);
    }
    for (int i = 0; i < p->threads; i++)
        free(p->scratch[i]);
}

/* Starts threads - 1 workers, or fewer if the system refuses more. `p` is zeroed memory. */
static void pool_start(pool *p, int threads, int64_t spin_ns)
{
    p->threads = threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads;
    p->spin_ns = spin_ns;
    p->pid = getpid();
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->wake, NULL);
    /* Workers take no signals, so that Ctrl-C interrupts the thread that waits; faults stay the faulting thread's. */
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP};
    sigset_t blocked, before;
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        sigdelset(&blocked, faults[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    for (int i = 1; i < p->threads; i++) {
        worker *w = &p->workers[p->started];
        w->owner = p;
        w->index = i;
        if (pthread_create(&w->thread, NULL, worker_main, w))
            break;
        p->started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

#endif
