/* First and only process of the test guest: keeps writing self-describing pages and keeps checking them.
 *
 * A page tells its index, the sequence number of the write that made it, and a checksum of all of it; the rest of it
 * follows from those two. A table beside the pages holds the sequence number each must have, so a page that is whole
 * but older than its last write is found too. What a migration loses or tears shows here and nowhere else.
 *
 * Settings come as KEY=VALUE on the kernel's command line, which the kernel hands on as environment:
 *   WRITER_MIB    memory to write, in MiB        (32)
 *   WRITER_RATE   pages written in a second      (2000)
 *   WRITER_SMALL  not 0: a write changes sixteen bytes of its page, for deltas   (0)
 *   WRITER_IN_TURN  not 0: page after page and round again, else pages at random (0)
 *
 * On the serial console, with the counts in decimal:
 *   writer MIB RATE                     once, before the first write
 *   tick N seq S passes P ok            five times a second; S writes so far, all memory checked P times
 *   tick N seq S passes P bad B         the same once B pages were found wrong
 *   CORRUPT page I ...                  for the first 20 wrong pages
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <time.h>
#include <unistd.h>

enum { PAGE_WORDS = 4096 / 8, STEPS_PER_SECOND = 100, STEPS_PER_TICK = 20, STEPS_PER_PASS = 100, REPORTED = 20 };

/* A page under test. All words but the checksum go into the checksum. */
struct page {
    uint64_t index;
    uint64_t sequence;
    uint64_t checksum;
    uint64_t filler[PAGE_WORDS - 3];
};
_Static_assert(sizeof(struct page) == 4096, "a page is 4 KiB");

static struct page *pages;
static uint64_t *expected; /* sequence number of the last write, per page */
static uint64_t page_count, sequence, wrong, small;

static uint64_t mix(uint64_t x) {
    x ^= x >> 31;
    x *= 0x9e3779b97f4a7c15u;
    return x ^ x >> 29;
}

static uint64_t filler_seed(uint64_t index, uint64_t sequence) {
    return mix(index + 1) ^ mix(small ? 0 : sequence << 20);
}

static void write_page(uint64_t index) {
    volatile struct page *page = &pages[index];
    uint64_t word = filler_seed(index, ++sequence), sum = mix(index) + mix(sequence);

    page->index = index;
    page->sequence = sequence;
    for (int i = 0; i < PAGE_WORDS - 3; i++) {
        word = word * 6364136223846793005u + 1442695040888963407u;
        page->filler[i] = word;
        sum = sum * 31 + word;
    }
    page->checksum = sum;
    expected[index] = sequence;
}

static void check_page(uint64_t index) {
    volatile struct page *page = &pages[index];
    uint64_t sum = mix(page->index) + mix(page->sequence), word = filler_seed(index, expected[index]);
    int first_wrong = -1;

    for (int i = 0; i < PAGE_WORDS - 3; i++) {
        uint64_t found = page->filler[i];
        word = word * 6364136223846793005u + 1442695040888963407u;
        if (found != word && first_wrong < 0)
            first_wrong = i;
        sum = sum * 31 + found;
    }
    if (page->index == index && page->sequence == expected[index] && page->checksum == sum && first_wrong < 0)
        return;
    if (wrong++ < REPORTED)
        printf("CORRUPT page %llu says index %llu seq %llu, expected seq %llu; checksum %s, first wrong word %d\n",
               (unsigned long long)index, (unsigned long long)page->index, (unsigned long long)page->sequence,
               (unsigned long long)expected[index], page->checksum == sum ? "fits" : "does not fit", first_wrong);
}

static uint64_t setting(const char *name, uint64_t otherwise) {
    const char *text = getenv(name);
    return text && *text ? strtoull(text, NULL, 10) : otherwise;
}

/* Memory that is present from the start. */
static void *memory(uint64_t bytes) {
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (at == MAP_FAILED) {
        perror("no memory for the pages");
        exit(1); /* the end of the first process is a kernel panic, which ends the machine */
    }
    return at;
}

static void open_console(void) {
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    int console = open("/dev/ttyS0", O_RDWR | O_NOCTTY);
    if (console >= 0) {
        dup2(console, 0);
        dup2(console, 1);
        dup2(console, 2);
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
}

int main(void) {
    open_console();
    uint64_t mib = setting("WRITER_MIB", 32), rate = setting("WRITER_RATE", 2000);
    small = setting("WRITER_SMALL", 0);
    uint64_t in_turn = setting("WRITER_IN_TURN", 0);
    page_count = mib << 8;
    pages = memory(page_count * sizeof(struct page));
    expected = memory(page_count * sizeof(uint64_t));
    printf("writer %llu %llu\n", (unsigned long long)mib, (unsigned long long)rate);
    for (uint64_t index = 0; index < page_count; index++)
        write_page(index);

    uint64_t random = 88172645463325252u, checked = 0, passes = 0, owed = 0;
    struct timespec next;
    clock_gettime(CLOCK_MONOTONIC, &next);
    for (uint64_t step = 1;; step++) {
        for (owed += rate; owed >= STEPS_PER_SECOND; owed -= STEPS_PER_SECOND) {
            random ^= random << 13, random ^= random >> 7, random ^= random << 17;
            write_page((in_turn ? sequence : random) % page_count);
        }
        for (uint64_t i = 0; i <= page_count / STEPS_PER_PASS; i++) {
            check_page(checked);
            if (++checked == page_count)
                checked = 0, passes++;
        }
        if (step % STEPS_PER_TICK == 0) {
            printf("tick %llu seq %llu passes %llu ", (unsigned long long)(step / STEPS_PER_TICK),
                   (unsigned long long)sequence, (unsigned long long)passes);
            if (wrong)
                printf("bad %llu\n", (unsigned long long)wrong);
            else
                puts("ok");
        }

        /* Keep the pace, but after a long stop go on from now instead of catching up. */
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        next.tv_nsec += 1000000000 / STEPS_PER_SECOND;
        if (next.tv_nsec >= 1000000000)
            next.tv_nsec -= 1000000000, next.tv_sec++;
        if (now.tv_sec > next.tv_sec || (now.tv_sec == next.tv_sec && now.tv_nsec > next.tv_nsec))
            next = now;
        else
            clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL);
    }
}
