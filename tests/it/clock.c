/* A host whose clock is wrong: loaded into a relay (LD_PRELOAD), it adds $CLOCK_WRONG_BY seconds to the time of day.
 * Waits until a time of day end when they would on a host whose clock is wrong: after the time that was meant. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/time.h>
#include <threads.h>
#include <time.h>

#define REAL(name) ((__typeof__(&(name)))dlsym(RTLD_NEXT, #name))

static time_t wrong_by(void) { return atol(getenv("CLOCK_WRONG_BY")); }

static struct timespec right(const struct timespec *at) {
    return (struct timespec){.tv_sec = at->tv_sec - wrong_by(), .tv_nsec = at->tv_nsec};
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = REAL(clock_gettime)(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += wrong_by();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int failed = REAL(gettimeofday)(now, zone);
    now->tv_sec += wrong_by();
    return failed;
}

int timespec_get(struct timespec *now, int base) {
    int done = REAL(timespec_get)(now, base);
    now->tv_sec += wrong_by();
    return done;
}

time_t time(time_t *kept) {
    time_t now = REAL(time)(NULL) + wrong_by();
    if (kept) *kept = now;
    return now;
}

int pthread_cond_timedwait(pthread_cond_t *restrict c, pthread_mutex_t *restrict m, const struct timespec *restrict at) {
    struct timespec until = right(at);
    return REAL(pthread_cond_timedwait)(c, m, &until);
}

int cnd_timedwait(cnd_t *restrict c, mtx_t *restrict m, const struct timespec *restrict at) {
    struct timespec until = right(at);
    return REAL(cnd_timedwait)(c, m, &until);
}
