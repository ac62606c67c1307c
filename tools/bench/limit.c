/*
 * What a FUSE server could do at best: the smallest low-level libfuse program with one live file.
 *
 *     limit MOUNTPOINT
 *
 * MOUNTPOINT/counter is served as cgfs serves a *.current file: direct I/O, its text fixed by the read
 * at offset 0, names and attributes cached for good, no FLUSH. One thread, as cgfs has.
 */
#define FUSE_USE_VERSION 34
#include <errno.h>
#include <fuse_lowlevel.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define FOREVER 1e9
#define COUNTER 2

struct snapshot {
	size_t len;
	char text[32];
};

static unsigned long counter = 41;

static void fill(fuse_ino_t ino, struct stat *st)
{
	memset(st, 0, sizeof(*st));
	st->st_ino = ino;
	st->st_mode = ino == COUNTER ? S_IFREG | 0444 : S_IFDIR | 0755;
	st->st_nlink = ino == COUNTER ? 1 : 2;
}

static void do_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct fuse_entry_param entry = {
		.ino = COUNTER, .attr_timeout = FOREVER, .entry_timeout = FOREVER,
	};

	if (parent != FUSE_ROOT_ID || strcmp(name, "counter")) {
		fuse_reply_err(req, ENOENT);
		return;
	}
	fill(COUNTER, &entry.attr);
	fuse_reply_entry(req, &entry);
}

static void do_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *file)
{
	struct stat st;

	(void)file;
	fill(ino, &st);
	fuse_reply_attr(req, &st, FOREVER);
}

static void do_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *file)
{
	struct snapshot *snapshot = calloc(1, sizeof(*snapshot));

	(void)ino;
	if (!snapshot) {
		fuse_reply_err(req, ENOMEM);
		return;
	}
	file->fh = (uintptr_t)snapshot;
	file->direct_io = 1;
	fuse_reply_open(req, file);
}

static void do_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset,
		    struct fuse_file_info *file)
{
	struct snapshot *snapshot = (struct snapshot *)(uintptr_t)file->fh;
	size_t left;

	(void)ino;
	if (offset == 0)
		snapshot->len = snprintf(snapshot->text, sizeof(snapshot->text), "%lu\n", counter);
	left = (size_t)offset < snapshot->len ? snapshot->len - offset : 0;
	fuse_reply_buf(req, snapshot->text + offset, left < size ? left : size);
}

static void do_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *file)
{
	(void)ino;
	free((struct snapshot *)(uintptr_t)file->fh);
	fuse_reply_err(req, 0);
}

int main(int argc, char **argv)
{
	static const struct fuse_lowlevel_ops ops = {
		.lookup = do_lookup, .getattr = do_getattr, .open = do_open,
		.read = do_read, .release = do_release,
	};
	char *fuse_argv[] = { argv[0], "-osubtype=limit", NULL };
	struct fuse_args args = FUSE_ARGS_INIT(2, fuse_argv);
	struct fuse_session *session;
	int status = 1;

	if (argc != 2) {
		fprintf(stderr, "usage: limit MOUNTPOINT\n");
		return 64;
	}
	session = fuse_session_new(&args, &ops, sizeof(ops), NULL);
	if (session && fuse_set_signal_handlers(session) == 0) {
		if (fuse_session_mount(session, argv[1]) == 0) {
			status = fuse_session_loop(session) < 0;
			fuse_session_unmount(session);
		}
		fuse_remove_signal_handlers(session);
	}
	if (session)
		fuse_session_destroy(session);
	fuse_opt_free_args(&args);
	return status;
}
