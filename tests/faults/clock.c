/* Moves the wall clock of single processes: by as many seconds as the file FAULTS_CLOCKS/PID says, where there is one.
   The monotonic clock stays as it is, as it does when a machine's time is set. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int (*true_clock)(clockid_t, struct timespec *);

static void find_true_clock(void) {
    if (!true_clock)
        true_clock = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
}

static long moved(void) {
    static __thread long seconds, looked_at;
    struct timespec now;
    find_true_clock();
    true_clock(CLOCK_MONOTONIC, &now);
    long at = now.tv_sec * 100 + now.tv_nsec / 10000000;
    if (at == looked_at)
        return seconds;
    looked_at = at;
    seconds = 0;
    char path[512];
    const char *folder = getenv("FAULTS_CLOCKS");
    if (folder && snprintf(path, sizeof path, "%s/%d", folder, (int)getpid()) < (int)sizeof path) {
        FILE *file = fopen(path, "r");
        if (file) {
            if (fscanf(file, "%ld", &seconds) != 1)
                seconds = 0;
            fclose(file);
        }
    }
    return seconds;
}

int clock_gettime(clockid_t clock, struct timespec *told) {
    find_true_clock();
    int failed = true_clock(clock, told);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        told->tv_sec += moved();
    return failed;
}

int gettimeofday(struct timeval *restrict told, void *restrict zone) {
    struct timespec now;
    (void)zone;
    int failed = clock_gettime(CLOCK_REALTIME, &now);
    told->tv_sec = now.tv_sec;
    told->tv_usec = now.tv_nsec / 1000;
    return failed;
}

time_t time(time_t *told) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (told)
        *told = now.tv_sec;
    return now.tv_sec;
}
