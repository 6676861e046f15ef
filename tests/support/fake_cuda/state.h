/* What the stand-in for the driver knows: things with handles, memory, and what waits on streams. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef void (*Launcher)(const char *, const unsigned *, unsigned, const uint64_t *, int);
enum { CONTEXT = 1, MODULE, FUNCTION, STREAM, EVENT, GRAPH, EXECUTABLE, NODE };
enum { COPY = 1, FILL, KERNEL, RECORD, WAIT };
enum { DEVICE_MEMORY = 1, HOST_MEMORY = 2, DEVICE_HANDLE = 40, MOST_DEVICES = 8, MOST_ARGUMENTS = 32 };

typedef struct Object Object;
typedef struct {
    int kind, count;
    unsigned sizes[6], shared;
    uint64_t to, from;
    size_t size;
    void *snapshot;
    Object *object;
    uint64_t values[MOST_ARGUMENTS];
} Operation;
struct Object {
    int kind, alive, flags, count;
    CUresult status; /* of a context: what killed it */
    Object *context, *owner, *capturing;
    char *name;
    double time;
    size_t position; /* of an event: so many operations of `owner` come before it */
    size_t length, capacity, done, dropped;
    Operation *operations;
    Object *next;
};
typedef struct {
    Object *function;
    unsigned sizes[6], shared;
    void **parameters, **extra;
    void *kernel, *context;
} KernelNode;
typedef struct Memory {
    uint64_t address;
    size_t size;
    int kind, is_ours;
    Object *context;
    struct Memory *next;
} Memory;

static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static char log_text[1 << 20], violations[1 << 14], failing[64];
static size_t log_end, memory_used, memory_limit = (size_t)1 << 34;
static int failing_status, devices = 1, capability = 86, initialized, live, is_quiet, is_interleaved, captures[3];
static double now;
static Launcher launcher;
static const char *const *parameter_counts;
static Object *contexts[MOST_DEVICES], *legacy[MOST_DEVICES], *objects;
static Memory *memories;
static __thread Object *current, *own_stream;
static __thread int thread_mode, own_captures;

/* --- what tests ask of it */

const char *fake_log(void) { return log_text; }
const char *fake_violations(void) { return violations; }
int fake_live(void) { return live; }
void fake_set_launcher(Launcher function) { launcher = function; }
void fake_set_parameter_counts(const char *const *entries) { parameter_counts = entries; }
void fake_set_memory(size_t bytes) { memory_limit = bytes; }
size_t fake_memory_used(void) { return memory_used; }
void fake_set_interleaved(int value) { is_interleaved = value; }
void fake_set_quiet(int value) { is_quiet = value; }
void fake_fail(const char *name, int status) { snprintf(failing, sizeof failing, "%s", name), failing_status = status; }
void fake_reset(int number, int count) {
    log_end = 0, log_text[0] = 0, violations[0] = 0, failing[0] = 0, capability = number, devices = count, is_quiet = is_interleaved = 0;
    memory_limit = (size_t)1 << 34, now = 0;
    for (int i = 0; i < MOST_DEVICES; i++) {
        if (contexts[i]) contexts[i]->status = 0;
    }
}
void fake_register(uint64_t address, size_t size) {
    Memory *memory = calloc(1, sizeof *memory);
    *memory = (Memory){address, size, DEVICE_MEMORY, 0, NULL, memories};
    memories = memory;
}
static size_t size_at(uint64_t address) {
    for (Memory *m = memories; m; m = m->next) {
        if (m->address == address) return m->size;
    }
    return 0;
}
uint64_t fake_base(uint64_t address) {
    for (Memory *m = memories; m; m = m->next) {
        if (m->address <= address && address < m->address + m->size) return m->address;
    }
    return 0;
}

/* --- rules */

static CUresult broken(const char *name, CUresult status, const char *format, ...) {
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    size_t length = strlen(violations);
    snprintf(violations + length, sizeof violations - length, "%s: %s\n", name, text);
    return status;
}
static CUresult note(const char *name) {
    if (is_quiet) return 0;
    size_t length = strlen(name);
    if (log_end + length + 2 < sizeof log_text) {
        memcpy(log_text + log_end, name, length);
        log_text[log_end + length] = '\n', log_text[log_end + length + 1] = 0, log_end += length + 1;
    }
    return strcmp(name, failing) ? 0 : failing_status;
}
static void unlock(int *unused) { pthread_mutex_unlock(&lock); }
static int is_unsafe_now(void) {
    if (thread_mode == 2) return 0;
    return own_captures > 0 || (thread_mode == 0 && captures[0] > 0);
}

#define BROKEN(status, ...) return broken(__func__, status, __VA_ARGS__)
#define ENTER                                                                                                          \
    __attribute__((cleanup(unlock))) int locked_ = pthread_mutex_lock(&lock);                                          \
    (void)locked_;                                                                                                     \
    CUresult status_ = note(__func__);                                                                                 \
    if (status_) return status_
#define ENTER_CONTEXT                                                                                                  \
    ENTER;                                                                                                             \
    if (!current || !current->alive) BROKEN(201, "no context is current in this thread");                              \
    if (current->status) return current->status
#define ENTER_STREAM(handle)                                                                                           \
    ENTER_CONTEXT;                                                                                                     \
    Object *stream = stream_of(handle);                                                                                \
    if (!stream || stream->kind != STREAM || !stream->alive) BROKEN(400, "not a live stream");                         \
    if (stream->context != current) BROKEN(400, "a stream of another context")
#define NEED(object, wanted)                                                                                           \
    if (!(object) || (object)->kind != (wanted) || !(object)->alive) BROKEN(400, "%s is not a live handle", #object);  \
    if ((object)->context != current) BROKEN(400, "%s is of another context", #object)
#define UNSAFE                                                                                                         \
    if (is_unsafe_now()) BROKEN(900, "unsafe while a graph is being recorded")

/* --- things with handles; they stay in memory, so that a use after their end is seen */

static Object *make(int kind) {
    Object *object = calloc(1, sizeof *object);
    *object = (Object){.kind = kind, .alive = 1, .context = current, .next = objects};
    objects = object, live++;
    return object;
}
static CUresult end(Object *object) { object->alive = 0, live--; return 0; }
static int live_in(Object *context) {
    int count = 0;
    for (Object *o = objects; o; o = o->next) {
        count += o->alive && o->context == context && o != context && o->kind != FUNCTION && o->kind != NODE &&
                 !(o->kind == STREAM && o->flags & 16);
    }
    for (Memory *m = memories; m; m = m->next) count += m->is_ours && m->context == context;
    return count - 1; /* the default stream */
}
static Object *stream_of(Object *handle) {
    if ((uintptr_t)handle > 2) return handle;
    if ((uintptr_t)handle == 2) {
        if (!own_stream) own_stream = make(STREAM), own_stream->flags = 17, live--;
        own_stream->context = current;
        return own_stream;
    }
    for (int i = 0; i < MOST_DEVICES; i++) {
        if (contexts[i] == current) return legacy[i];
    }
    return NULL;
}
static int count_of(const char *name) {
    for (const char *const *entry = parameter_counts; entry && *entry; entry++) {
        size_t length = strlen(name);
        if (!strncmp(*entry, name, length) && (*entry)[length] == '=') return atoi(*entry + length + 1);
    }
    return -1;
}
static int shared_limit(void) {
    return 1024 * (capability == 75 ? 64 : capability == 80 ? 163 : capability == 90 ? 227 : 99);
}

/* --- memory */

static uint64_t allocate(size_t size, int kind) {
    Memory *memory = calloc(1, sizeof *memory);
    uint64_t address = (uint64_t)(uintptr_t)aligned_alloc(256, (size + 511) / 256 * 256);
    memset((void *)(uintptr_t)address, 0xCD, size);
    *memory = (Memory){address, size, kind, 1, current, memories};
    memories = memory, live++;
    if (kind == DEVICE_MEMORY) memory_used += size;
    return address;
}
static int release(uint64_t address, int kind) {
    for (Memory **at = &memories; *at; at = &(*at)->next) {
        Memory *memory = *at;
        if (memory->address != address || memory->kind != kind || !memory->is_ours) continue;
        if (kind == DEVICE_MEMORY) memory_used -= memory->size;
        memset((void *)(uintptr_t)address, 0xDD, memory->size);
        free((void *)(uintptr_t)address);
        *at = memory->next, live--;
        free(memory);
        return 1;
    }
    return 0;
}
static int inside(uint64_t address, size_t size, int kind) {
    for (Memory *m = memories; m; m = m->next) {
        if (m->kind == kind && m->address <= address && address + size <= m->address + m->size) return 1;
    }
    return 0;
}

/* --- streams: lists of operations, done as late as the rules allow; or, while one is waited for, all in turn */

static void append(Object *object, Operation operation) {
    if (object->length - object->dropped == object->capacity) {
        object->capacity = object->capacity ? 2 * object->capacity : 64;
        object->operations = realloc(object->operations, object->capacity * sizeof(Operation));
    }
    object->operations[object->length++ - object->dropped] = operation;
}
static void run_to(Object *stream, size_t position);
static void put(Object *stream, Operation operation) {
    if (stream->capturing) {
        append(stream->capturing, operation);
        return;
    }
    /* The default stream and streams that are not "non-blocking" wait for each other. */
    for (Object *o = objects; o && !(stream->flags & 1); o = o->next) {
        int is_default = 0, is_other_default = 0;
        for (int i = 0; i < MOST_DEVICES; i++) is_default |= legacy[i] == stream, is_other_default |= legacy[i] == o;
        int waits = o->kind == STREAM && o->alive && o != stream && o->context == stream->context && !(o->flags & 1);
        if (waits && is_default != is_other_default && o->done < o->length) {
            append(stream, (Operation){.kind = WAIT, .object = o, .size = o->length});
        }
    }
    append(stream, operation);
}
static void launch(Object *context, Operation *operation) {
    now += 0.01;
    for (int i = 0; i < operation->count; i++) {
        if (!inside(operation->values[i], 1, DEVICE_MEMORY)) {
            context->status = 700;
            return;
        }
    }
    if (launcher && !is_quiet) {
        launcher(operation->object->name, operation->sizes, operation->shared, operation->values, operation->count);
    }
}
static void run(Object *stream, Operation *operation) {
    void *to = (void *)(uintptr_t)operation->to;
    switch (operation->kind) {
    case COPY:
        memcpy(to, operation->snapshot ? operation->snapshot : (void *)(uintptr_t)operation->from, operation->size);
        free(operation->snapshot);
        break;
    case FILL: memset(to, (int)operation->from, operation->size); break;
    case KERNEL: launch(stream->context, operation); break;
    case RECORD: operation->object->time = now; break;
    default: run_to(operation->object, operation->size);
    }
}
static void step(Object *stream) {
    Operation operation = stream->operations[stream->done++ - stream->dropped];
    stream->count++; /* It waits, perhaps: nothing that comes later may begin. */
    run(stream, &operation);
    stream->count--;
    if (stream->done == stream->length) stream->dropped = stream->length;
}
static void step_others(Object *stream) {
    for (Object *o = objects; o && is_interleaved; o = o->next) {
        if (o->kind != STREAM || !o->alive || o->count || o == stream || o->done == o->length) continue;
        Operation *next = &o->operations[o->done - o->dropped];
        if (next->kind != WAIT || next->object->done >= next->size) step(o);
    }
}
static void run_to(Object *stream, size_t position) {
    while (stream->done < position && !stream->context->status) {
        step(stream);
        step_others(stream);
    }
}
static void finish(Object *stream) { run_to(stream, stream->length); }
static void finish_all(void) {
    for (Object *o = objects; o; o = o->next) {
        if (o->kind == STREAM) finish(o);
    }
}
static int is_being_copied(uint64_t address, size_t size) {
    for (Object *o = objects; o; o = o->next) {
        for (size_t i = o->done; o->kind == STREAM && o->alive && i < o->length; i++) {
            Operation *operation = &o->operations[i - o->dropped];
            if (operation->kind != COPY) continue;
            if (operation->to - address < size || (!operation->snapshot && operation->from - address < size)) return 1;
        }
    }
    return 0;
}
static int has_happened(Object *event) { return !event->owner || event->owner->done >= event->position; }
