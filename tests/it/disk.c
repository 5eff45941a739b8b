/* A disk whose power may fail: loaded into a relay (LD_PRELOAD), it keeps in $DISK_SAFE what was synced of each file in
 * $DISK_OF, and in the file `folders` there the names of the folders that were synced. Nothing else outlives the power.
 * While $DISK_SAFE/stuck is there, nothing is synced, and whoever asked for it waits. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;

static void note_folder(const char *safe, const char *folder) {
    char name[PATH_MAX];
    snprintf(name, sizeof name, "%s/folders", safe);
    int notes = open(name, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    dprintf(notes, "%s\n", folder);
    close(notes);
}

static void keep_file(int fd, const char *safe, const char *name) {
    static _Thread_local char piece[1 << 16];
    char copying[PATH_MAX], kept[PATH_MAX];
    snprintf(copying, sizeof copying, "%s/%s.copying", safe, name);
    snprintf(kept, sizeof kept, "%s/%s", safe, name);
    int copy = open(copying, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    /* By the relay's own descriptor: closing another one of this file would take its locks away. */
    ssize_t length;
    for (off_t at = 0; (length = pread(fd, piece, sizeof piece, at)) > 0; at += length)
        if (write(copy, piece, length) != length) abort();
    close(copy);
    rename(copying, kept);
}

static int sync_and_keep(const char *how, int fd) {
    const char *of = getenv("DISK_OF"), *safe = getenv("DISK_SAFE");
    char link[64], path[PATH_MAX], stuck[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    snprintf(stuck, sizeof stuck, "%s/stuck", safe);
    while (access(stuck, F_OK) == 0) usleep(5000);
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, how);
    int failed = real(fd);
    struct stat stat;
    if (failed || fstat(fd, &stat)) return failed;
    pthread_mutex_lock(&turn);
    if (S_ISDIR(stat.st_mode)) note_folder(safe, path);
    else if (strncmp(path, of, strlen(of)) == 0) keep_file(fd, safe, strrchr(path, '/') + 1);
    pthread_mutex_unlock(&turn);
    return 0;
}

int fsync(int fd) { return sync_and_keep("fsync", fd); }
int fdatasync(int fd) { return sync_and_keep("fdatasync", fd); }
