/*
 * The only program in the image: no libc, about a kilobyte of code.
 *
 *   hello                print /etc/hello.conf's greeting, or a built-in one
 *   hello --remove FILE  unlink FILE (the Dockerfile's way to a whiteout: there is no shell)
 *
 * Build: gcc -Os -static -nostdlib -ffreestanding (see ../make.sh).
 */
#if defined(__x86_64__)
enum { SYS_read = 0, SYS_write = 1, SYS_exit = 60, SYS_openat = 257, SYS_unlinkat = 263 };

static long syscall4(long n, long a, long b, long c, long d) {
    register long r10 __asm__("r10") = d;
    __asm__ volatile("syscall"
                     : "+a"(n)
                     : "D"(a), "S"(b), "d"(c), "r"(r10)
                     : "rcx", "r11", "memory");
    return n;
}

__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall start\n");
#elif defined(__aarch64__)
enum { SYS_read = 63, SYS_write = 64, SYS_exit = 93, SYS_openat = 56, SYS_unlinkat = 35 };

static long syscall4(long n, long a, long b, long c, long d) {
    register long x8 __asm__("x8") = n;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3) : "memory");
    return x0;
}

__asm__(".globl _start\n_start:\n\tmov x29, #0\n\tmov x0, sp\n\tbl start\n");
#else
#error "only x86_64 and aarch64"
#endif

enum { AT_FDCWD = -100, STDOUT = 1 };

static char conf[1024];

static long length(const char *s) {
    long n = 0;
    while (s[n]) n++;
    return n;
}

static void put(const char *s, long n) { syscall4(SYS_write, STDOUT, (long)s, n, 0); }

static int starts_with(const char *s, const char *prefix) {
    while (*prefix)
        if (*s++ != *prefix++) return 0;
    return 1;
}

/* Prints what follows `greeting=` in the configuration; 0 if it is not there. */
static int greet_from_conf(void) {
    long fd = syscall4(SYS_openat, AT_FDCWD, (long)"/etc/hello.conf", 0, 0);
    if (fd < 0) return 0;
    long n = syscall4(SYS_read, fd, (long)conf, sizeof conf - 1, 0);
    for (long i = 0; i < n; i++) {
        if ((i == 0 || conf[i - 1] == '\n') && starts_with(conf + i, "greeting=")) {
            char *from = conf + i + length("greeting=");
            long m = 0;
            while (from[m] && from[m] != '\n') m++;
            put(from, m);
            put("\n", 1);
            return 1;
        }
    }
    return 0;
}

void start(long *sp) {
    long argc = sp[0];
    char **argv = (char **)(sp + 1);
    long status = 0;
    if (argc == 3 && starts_with(argv[1], "--remove"))
        status = syscall4(SYS_unlinkat, AT_FDCWD, (long)argv[2], 0, 0) != 0;
    else if (!greet_from_conf())
        put("Hello.\n", 7);
    syscall4(SYS_exit, status, 0, 0, 0);
    for (;;) {}
}
