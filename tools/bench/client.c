/*
 * The client of every world: one operation over and over, timed where it happens.
 *
 *     client read  FILE MILLISECONDS          open, read, read at the end, close
 *     client write FILE MILLISECONDS A B      open, write A (next time B), close
 *     client mkdir DIR  MILLISECONDS          mkdir, rmdir
 *
 * Prints the median nanoseconds of one operation: the time is taken over batches of it, so that a
 * clock reading costs nothing and a pre-empted batch does not count.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 20, MOST_BATCHES = 1 << 16 };

static const char *path;
static const char *texts[2];

static void die(const char *what)
{
	fprintf(stderr, "client: %s %s: %s\n", what, path, strerror(errno));
	exit(1);
}

static void do_read(unsigned long turn)
{
	char text[4096];
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	(void)turn;
	if (fd < 0)
		die("open");
	if (read(fd, text, sizeof(text)) <= 0)
		die("read");
	if (read(fd, text, sizeof(text)) != 0)
		die("read at the end of");
	if (close(fd) != 0)
		die("close");
}

static void do_write(unsigned long turn)
{
	const char *text = texts[turn % 2];
	/* The flags of a shell's `echo N > FILE`. */
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);

	if (fd < 0)
		die("open");
	if (write(fd, text, strlen(text)) != (ssize_t)strlen(text))
		die("write");
	if (close(fd) != 0)
		die("close");
}

static void do_mkdir(unsigned long turn)
{
	(void)turn;
	if (mkdir(path, 0755) != 0)
		die("mkdir");
	if (rmdir(path) != 0)
		die("rmdir");
}

static long now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000L + t.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
	long x = *(const long *)a, y = *(const long *)b;

	return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
	static long batches[MOST_BATCHES];
	void (*operation)(unsigned long);
	unsigned long turn = 0;
	long start, end, deadline;
	int n = 0;

	if (argc == 4 && !strcmp(argv[1], "read"))
		operation = do_read;
	else if (argc == 6 && !strcmp(argv[1], "write"))
		operation = do_write;
	else if (argc == 4 && !strcmp(argv[1], "mkdir"))
		operation = do_mkdir;
	else {
		fprintf(stderr, "usage: client read|write|mkdir PATH MILLISECONDS [A B]\n");
		return 64;
	}
	path = argv[2];
	if (operation == do_write) {
		texts[0] = argv[4];
		texts[1] = argv[5];
	}
	end = now_ns();
	deadline = end + atol(argv[3]) * 1000000L;
	while (end < deadline && n < MOST_BATCHES) {
		start = end;
		for (int i = 0; i < BATCH; i++)
			operation(turn++);
		end = now_ns();
		batches[n++] = end - start;
	}
	qsort(batches, n, sizeof(*batches), by_value);
	printf("%ld\n", batches[n / 2] / BATCH);
	return 0;
}
