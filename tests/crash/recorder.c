/* Records what a process and its children write below a directory: an event for each change, in order.

   cc -shared -fPIC -O2 -o recorder.so recorder.c
   LD_PRELOAD=./recorder.so RECORDED_ROOT=DIR RECORD=FILE command

   A seccomp filter traps each system call that changes files. The handler of SIGSYS makes the call, and appends
   an event with the data to FILE. So no write is missed, whether a program calls the C library, one that is
   linked in statically, or the kernel itself. disk.py reads the events.

   The handler's own calls pass the filter because of the number in their sixth argument, which they don't use.
   Calls that use it have no trap: programs are told that the kernel lacks them and take others. Writes through
   a shared mapping are not seen; disk.py checks at the end that none are missing.

   Linux on x86-64. Events of several processes are in the order in which they were appended. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

#ifndef __x86_64__
#error "the recorder knows the system calls of x86-64 only"
#endif

#define OURS 0x7ec07de5
#define PATH_MAX_BYTES 4096
#define WRITES (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)

/* A header, then two paths and the data. Python's struct reads it as "<BBHHHQqqq". */
struct __attribute__((packed)) event {
  uint8_t kind, is_folder;
  uint16_t mode, first_bytes, second_bytes;
  uint64_t inode;
  int64_t offset, data_bytes, number;
};
enum { CREATE, TRUNCATE, WRITE, RENAME, LINK, UNLINK, MKDIR, RMDIR, SYMLINK, CHMOD, SYNC, SYNC_ALL };

static const char *root;
static size_t root_bytes;
static int record = -1;
static volatile int busy;

static long call(long number, long a, long b, long c, long d, long e) {
  long result;
  register long r10 __asm__("r10") = d;
  register long r8 __asm__("r8") = e;
  register long r9 __asm__("r9") = OURS;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                   : "rcx", "r11", "memory");
  return result; /* -errno after an error */
}

static void put(struct event head, const char *first, const char *second, const void *data) {
  head.first_bytes = first ? strlen(first) : 0;
  head.second_bytes = second ? strlen(second) : 0;
  struct iovec parts[] = {{&head, sizeof head},
                          {(void *)first, head.first_bytes},
                          {(void *)second, head.second_bytes},
                          {(void *)data, head.data_bytes}};
  long all = sizeof head + head.first_bytes + head.second_bytes + head.data_bytes;
  if (call(SYS_writev, record, (long)parts, 4, 0, 0) != all) {
    static const char text[] = "recorder: the record can't be written\n";
    call(SYS_write, 2, (long)text, sizeof text - 1, 0, 0);
    call(SYS_exit_group, 99, 0, 0, 0, 0);
  }
}

/* The path of an open file or folder; returns whether it lies below the root. */
static int path_of(int descriptor, char *path) {
  char link[40] = "/proc/self/fd/";
  char digits[12];
  int n = 0, at = strlen(link);
  unsigned value = descriptor;
  do digits[n++] = '0' + value % 10; while (value /= 10);
  while (n) link[at++] = digits[--n];
  long bytes = call(SYS_readlink, (long)link, (long)path, PATH_MAX_BYTES - 1, 0, 0);
  if (bytes < 0) return 0;
  path[bytes] = 0;
  return !strncmp(path, root, root_bytes) && (path[root_bytes] == '/' || !path[root_bytes]);
}

/* A path of a call ...at, made absolute. */
static const char *absolute(int folder, const char *name, char *path) {
  if (name[0] == '/') return name;
  long bytes;
  if (folder == AT_FDCWD) {
    bytes = call(SYS_getcwd, (long)path, PATH_MAX_BYTES, 0, 0, 0) - 1;
  } else {
    path_of(folder, path);
    bytes = strlen(path);
  }
  if (bytes < 0 || bytes + strlen(name) + 2 > PATH_MAX_BYTES) return name;
  path[bytes] = '/';
  strcpy(path + bytes + 1, name);
  return path;
}

/* Fills in an open file's inode; returns whether it is a file or folder below the root. */
static int is_recorded(int descriptor, struct event *event) {
  struct stat status;
  char path[PATH_MAX_BYTES];
  if (call(SYS_fstat, descriptor, (long)&status, 0, 0, 0)) return 0;
  if (!S_ISREG(status.st_mode) && !S_ISDIR(status.st_mode)) return 0;
  event->inode = status.st_ino;
  event->is_folder = S_ISDIR(status.st_mode);
  return path_of(descriptor, path);
}

static void wrote(int descriptor, int64_t offset, const struct iovec *parts, int64_t bytes) {
  struct event event = {.kind = WRITE};
  if (bytes <= 0 || !is_recorded(descriptor, &event)) return;
  event.offset = offset < 0 ? call(SYS_lseek, descriptor, 0, SEEK_CUR, 0, 0) - bytes : offset;
  for (; bytes; parts++) {
    event.data_bytes = (int64_t)parts->iov_len < bytes ? (int64_t)parts->iov_len : bytes;
    if (event.data_bytes) put(event, 0, 0, parts->iov_base);
    event.offset += event.data_bytes;
    bytes -= event.data_bytes;
  }
}

/* Records bytes that the kernel copied: reads them back. */
static void copied(int descriptor, int64_t bytes) {
  struct event event = {.kind = WRITE};
  char path[PATH_MAX_BYTES], part[4096];
  if (bytes <= 0 || !is_recorded(descriptor, &event) || !path_of(descriptor, path)) return;
  event.offset = call(SYS_lseek, descriptor, 0, SEEK_CUR, 0, 0) - bytes;
  long copy = call(SYS_openat, AT_FDCWD, (long)path, O_RDONLY | O_CLOEXEC, 0, 0);
  while (bytes > 0) {
    event.data_bytes = call(SYS_pread64, copy, (long)part, bytes < 4096 ? bytes : 4096, event.offset, 0);
    if (event.data_bytes <= 0) break;
    put(event, 0, 0, part);
    event.offset += event.data_bytes;
    bytes -= event.data_bytes;
  }
  call(SYS_close, copy, 0, 0, 0, 0);
}

static long opened(int folder, const char *name, int flags, int mode) {
  struct stat before;
  char path[PATH_MAX_BYTES];
  int was = !call(SYS_newfstatat, folder, (long)name, (long)&before, 0, 0);
  long descriptor = call(SYS_openat, folder, (long)name, flags, mode, 0);
  struct event event = {.kind = was ? TRUNCATE : CREATE};
  if (descriptor < 0 || !is_recorded(descriptor, &event) || event.is_folder) return descriptor;
  if (!was) {
    struct stat status;
    call(SYS_fstat, descriptor, (long)&status, 0, 0, 0);
    event.mode = status.st_mode & 07777;
    path_of(descriptor, path);
    put(event, path, 0, 0);
  } else if (flags & O_TRUNC && before.st_size) {
    put(event, 0, 0, 0);
  }
  return descriptor;
}

static void truncated(int descriptor, int64_t size) {
  struct event event = {.kind = TRUNCATE, .offset = size};
  if (is_recorded(descriptor, &event)) put(event, 0, 0, 0);
}

static void named(int kind, int mode, const char *first, const char *second) {
  struct event event = {.kind = kind, .mode = mode};
  struct stat status;
  if (!call(SYS_newfstatat, AT_FDCWD, (long)(second ? second : first), (long)&status, AT_SYMLINK_NOFOLLOW, 0)) {
    event.inode = status.st_ino;
    event.is_folder = S_ISDIR(status.st_mode);
    if (kind == MKDIR || kind == CHMOD) event.mode = status.st_mode & 07777;
  }
  put(event, first, second, 0);
}

/* Makes a trapped call and records it. */
static long make(long number, long a, long b, long c, long d, long e) {
  char first[PATH_MAX_BYTES], second[PATH_MAX_BYTES];
  struct event event = {0};
  long result;
  switch (number) {
    case SYS_open: return opened(AT_FDCWD, (char *)a, b, c);
    case SYS_creat: return opened(AT_FDCWD, (char *)a, O_CREAT | O_WRONLY | O_TRUNC, b);
    case SYS_openat: return opened(a, (char *)b, c, d);
    /* The older calls become their newer forms. */
    case SYS_rename: return make(SYS_renameat2, AT_FDCWD, a, AT_FDCWD, b, 0);
    case SYS_renameat: return make(SYS_renameat2, a, b, c, d, 0);
    case SYS_link: return make(SYS_linkat, AT_FDCWD, a, AT_FDCWD, b, 0);
    case SYS_unlink: return make(SYS_unlinkat, AT_FDCWD, a, 0, 0, 0);
    case SYS_rmdir: return make(SYS_unlinkat, AT_FDCWD, a, AT_REMOVEDIR, 0, 0);
    case SYS_mkdir: return make(SYS_mkdirat, AT_FDCWD, a, b, 0, 0);
    case SYS_symlink: return make(SYS_symlinkat, a, AT_FDCWD, b, 0, 0);
    case SYS_chmod: return make(SYS_fchmodat, AT_FDCWD, a, b, 0, 0);
  }
  result = call(number, a, b, c, d, e);
  if (result < 0) return result;
  switch (number) {
    case SYS_write: case SYS_pwrite64: {
      struct iovec part = {(void *)b, c};
      wrote(a, number == SYS_write ? -1 : d, &part, result);
      break;
    }
    case SYS_writev: case SYS_pwritev: wrote(a, number == SYS_writev ? -1 : d, (struct iovec *)b, result); break;
    case SYS_sendfile: copied(a, result); break;
    case SYS_ftruncate: truncated(a, b); break;
    case SYS_truncate: {
      long file = call(SYS_openat, AT_FDCWD, a, O_RDONLY | O_CLOEXEC, 0, 0);
      truncated(file, b);
      call(SYS_close, file, 0, 0, 0, 0);
      break;
    }
    case SYS_renameat2: named(RENAME, e, absolute(a, (char *)b, first), absolute(c, (char *)d, second)); break;
    case SYS_linkat: named(LINK, 0, absolute(a, (char *)b, first), absolute(c, (char *)d, second)); break;
    case SYS_unlinkat: named(c & AT_REMOVEDIR ? RMDIR : UNLINK, 0, absolute(a, (char *)b, first), 0); break;
    case SYS_mkdirat: named(MKDIR, c, absolute(a, (char *)b, first), 0); break;
    case SYS_symlinkat: named(SYMLINK, 0, (char *)a, absolute(b, (char *)c, second)); break;
    case SYS_fchmodat: named(CHMOD, c, absolute(a, (char *)b, first), 0); break;
    case SYS_fchmod:
      event = (struct event){.kind = CHMOD, .mode = b & 07777};
      if (is_recorded(a, &event) && path_of(a, first)) put(event, first, 0, 0);
      break;
    case SYS_fsync: case SYS_fdatasync:
      event.kind = SYNC;
      if (is_recorded(a, &event)) put(event, 0, 0, 0);
      break;
    case SYS_sync: case SYS_syncfs:
      event.kind = SYNC_ALL;
      put(event, 0, 0, 0);
      break;
  }
  return result;
}

static void trapped(int signal, siginfo_t *info, void *context) {
  greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
  (void)signal;
  (void)info;
  int before = errno;
  while (__sync_lock_test_and_set(&busy, 1)) call(SYS_sched_yield, 0, 0, 0, 0, 0);
  r[REG_RAX] = make(r[REG_RAX], r[REG_RDI], r[REG_RSI], r[REG_RDX], r[REG_R10], r[REG_R8]);
  __sync_lock_release(&busy);
  errno = before;
}

static void after_fork(void) { busy = 0; }

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define RETURN(value) BPF_STMT(BPF_RET | BPF_K, value)
#define IF(value, then) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, then)
/* Each is "if the call is this one, return" in two or four steps. */
#define TRAP(number) IF(number, 1), RETURN(SECCOMP_RET_TRAP)
#define ABSENT(number) IF(number, 1), RETURN(SECCOMP_RET_ERRNO | ENOSYS)
#define TRAP_IF_IT_WRITES(number, argument)                                                                    \
  IF(number, 4), LOAD(args[argument]), BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, WRITES, 0, 1),                     \
      RETURN(SECCOMP_RET_TRAP), RETURN(SECCOMP_RET_ALLOW)

__attribute__((constructor)) static void begin(void) {
  root = getenv("RECORDED_ROOT");
  const char *file = getenv("RECORD");
  if (!root || !file) return;
  root_bytes = strlen(root);
  /* First, because a process that was started by a recorded one has the filter already. */
  struct sigaction action = {.sa_sigaction = trapped, .sa_flags = SA_SIGINFO};
  sigfillset(&action.sa_mask);
  sigaction(SIGSYS, &action, 0);
  /* A high number, because programs may take it for granted that 3 is free. */
  long low = call(SYS_openat, AT_FDCWD, (long)file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666, 0);
  record = fcntl(low, F_DUPFD_CLOEXEC, 900);
  close(low);
  extern int pthread_atfork(void (*)(void), void (*)(void), void (*)(void));
  pthread_atfork(0, 0, after_fork);
  struct sock_filter steps[] = {
      LOAD(arch), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0), RETURN(SECCOMP_RET_ALLOW),
      LOAD(args[5]), IF(OURS, 1), RETURN(SECCOMP_RET_ALLOW),
      LOAD(nr),
      TRAP_IF_IT_WRITES(SYS_open, 1), TRAP_IF_IT_WRITES(SYS_openat, 2), TRAP(SYS_creat),
      TRAP(SYS_write), TRAP(SYS_writev), TRAP(SYS_pwrite64), TRAP(SYS_pwritev), TRAP(SYS_sendfile), TRAP(SYS_ftruncate), TRAP(SYS_truncate),
      TRAP(SYS_rename), TRAP(SYS_renameat), TRAP(SYS_renameat2), TRAP(SYS_link), TRAP(SYS_linkat),
      TRAP(SYS_unlink), TRAP(SYS_unlinkat), TRAP(SYS_rmdir), TRAP(SYS_mkdir), TRAP(SYS_mkdirat),
      TRAP(SYS_symlink), TRAP(SYS_symlinkat), TRAP(SYS_chmod), TRAP(SYS_fchmod), TRAP(SYS_fchmodat),
      TRAP(SYS_fsync), TRAP(SYS_fdatasync), TRAP(SYS_sync), TRAP(SYS_syncfs),
      ABSENT(SYS_copy_file_range), ABSENT(SYS_pwritev2), ABSENT(SYS_splice), ABSENT(SYS_fallocate),
      ABSENT(SYS_openat2), ABSENT(SYS_io_uring_setup),
      RETURN(SECCOMP_RET_ALLOW)};
  struct sock_fprog filter = {sizeof steps / sizeof *steps, steps};
  if (record < 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
      prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter)) {
    static const char text[] = "recorder: it can't begin\n";
    if (write(2, text, sizeof text - 1)) _exit(99);
  }
}
