/* Files of the commands: XDG paths, whole-file reading, safe writing. */
#include "cli/cli.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

bool kvs_cli_xdg_path(const char *variable, const char *fallback, const char *leaf, char *path, size_t cap_bytes)
{
    const char *const base = getenv(variable), *const home = getenv("HOME");
    int n;
    if (base != NULL && base[0] == '/') /* the XDG specification: a relative path is to be ignored */
        n = snprintf(path, cap_bytes, "%s/kvasir/%s", base, leaf);
    else if (home != NULL && home[0] != '\0')
        n = snprintf(path, cap_bytes, "%s/%s/kvasir/%s", home, fallback, leaf);
    else
        return false;
    return n > 0 && (size_t)n < cap_bytes;
}

kvs_status kvs_cli_make_parents(const char *path, kvs_error *err)
{
    char part[4096];
    if (strlen(path) >= sizeof part)
        return kvs_error_set(err, KVS_EINVAL, "the path %.40s... is longer than %zu bytes", path, sizeof part - 1);
    for (size_t i = 1; path[i] != '\0'; i++) {
        if (path[i] != '/')
            continue;
        memcpy(part, path, i);
        part[i] = '\0';
        if (mkdir(part, 0700) != 0 && errno != EEXIST)
            return kvs_error_set(err, KVS_EIO, "cannot create the folder %s: %s", part, strerror(errno));
    }
    return KVS_OK;
}

kvs_status kvs_cli_read_file(const char *path, char **bytes, size_t *n_bytes, kvs_error *err)
{
    const bool is_stdin = strcmp(path, "-") == 0;
    *bytes = NULL;
    *n_bytes = 0;
    FILE *const f = is_stdin ? stdin : fopen(path, "rb");
    if (f == NULL)
        return kvs_error_set(err, KVS_EIO, "cannot read %s: %s", path, strerror(errno));
    size_t cap = 65536, n = 0;
    char *data = malloc(cap);
    kvs_status status = data != NULL ? KVS_OK : kvs_error_set(err, KVS_ENOMEM, "no memory for %s", path);
    while (status == KVS_OK) {
        const size_t got = fread(data + n, 1, cap - 1 - n, f);
        n += got;
        if (got == 0)
            break;
        if (n == cap - 1) {
            char *const grown = realloc(data, cap * 2);
            if (grown == NULL) {
                status = kvs_error_set(err, KVS_ENOMEM, "no memory for %s", path);
                break;
            }
            data = grown;
            cap *= 2;
        }
    }
    if (status == KVS_OK && ferror(f))
        status = kvs_error_set(err, KVS_EIO, "cannot read %s: %s", path, strerror(errno));
    if (!is_stdin)
        fclose(f);
    if (status != KVS_OK) {
        free(data);
        return status;
    }
    data[n] = '\0';
    *bytes = data;
    *n_bytes = n;
    return KVS_OK;
}

static bool write_all(int fd, const void *data, size_t n_bytes)
{
    const char *p = data;
    while (n_bytes > 0) {
        const ssize_t n = write(fd, p, n_bytes);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        p += n;
        n_bytes -= (size_t)n;
    }
    return true;
}

kvs_status kvs_cli_write_file(const char *path, const void *head, size_t head_bytes, const void *body,
                              size_t body_bytes, kvs_error *err)
{
    char temporary[4200];
    const int n = snprintf(temporary, sizeof temporary, "%s.%ld.tmp", path, (long)getpid());
    if (n < 0 || (size_t)n >= sizeof temporary)
        return kvs_error_set(err, KVS_EINVAL, "the path %.40s... is too long", path);
    KVS_TRY(kvs_cli_make_parents(path, err));
    const int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0)
        return kvs_error_set(err, KVS_EIO, "cannot write %s: %s", path, strerror(errno));
    bool good = write_all(fd, head, head_bytes) && write_all(fd, body, body_bytes) && fsync(fd) == 0;
    int cause = errno;
    if (close(fd) != 0 && good) {
        good = false;
        cause = errno;
    }
    if (good && rename(temporary, path) != 0) {
        good = false;
        cause = errno;
    }
    if (!good) {
        unlink(temporary);
        return kvs_error_set(err, KVS_EIO, "cannot write %s: %s", path, strerror(cause));
    }
    return KVS_OK;
}
