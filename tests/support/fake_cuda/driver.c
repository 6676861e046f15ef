/* The entry points of the CUDA driver that the package calls, for tests: memory is host memory, launches go to a
   callback, every call is noted in a log. Nothing of this is shipped. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef void (*Launcher)(const char *, const unsigned *, unsigned, const uint64_t *, int);

typedef struct {
    const char *name;
    unsigned sizes[6], shared;
    int count;
    uint64_t values[32];
} Launch;

typedef struct {
    int count;
    Launch launches[512];
} Graph;

static char log_text[1 << 20], failing[64];
static size_t log_end;
static int failing_status, allocated, devices = 1, capability = 86;
static Graph *capturing;
static Launcher launcher;
static const char *const *parameter_counts;

void fake_reset(int number, int count) {
    log_end = 0, log_text[0] = 0, failing[0] = 0, capturing = NULL, capability = number, devices = count;
}
const char *fake_log(void) { return log_text; }
int fake_allocated(void) { return allocated; }
void fake_set_launcher(Launcher function) { launcher = function; }
void fake_fail(const char *name, int status) { snprintf(failing, sizeof failing, "%s", name), failing_status = status; }

static CUresult note(const char *name) {
    if (log_end + strlen(name) + 2 < sizeof log_text) {
        log_end += (size_t)sprintf(log_text + log_end, "%s\n", name);
    }
    return strcmp(name, failing) ? 0 : failing_status;
}
#define NOTE                                                                                                           \
    do {                                                                                                               \
        CUresult status_ = note(__func__);                                                                             \
        if (status_) return status_;                                                                                   \
    } while (0)
#define HANDLE(target)                                                                                                 \
    do {                                                                                                               \
        NOTE;                                                                                                          \
        *(target) = malloc(1);                                                                                         \
        return 0;                                                                                                      \
    } while (0)

CUresult cuInit(unsigned flags) { NOTE; return flags != 0; }
CUresult cuGetErrorString(CUresult status, const char **text) {
    *text = status == 2 ? "out of memory" : "some failure";
    return 0;
}
CUresult cuDeviceGetCount(int *count) { NOTE; *count = devices; return 0; }
CUresult cuDeviceGet(int *device, int ordinal) { NOTE; *device = ordinal; return 0; }
CUresult cuDeviceGetName(char *name, int size, int device) { NOTE; snprintf(name, (size_t)size, "Test GPU"); return 0; }
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    NOTE;
    *value = attribute == 75 ? capability / 10 : capability % 10;
    return 0;
}
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { HANDLE(context); }
CUresult cuCtxSetCurrent(void *context) { NOTE; return context == NULL; }
CUresult cuModuleLoadData(void **module, const void *image) { HANDLE(module); }
CUresult cuModuleGetFunction(void **function, void *module, const char *name) { NOTE; *function = strdup(name); return 0; }
CUresult cuFuncSetAttribute(void *function, int attribute, int value) { NOTE; return attribute != 8; }
CUresult cuMemAlloc_v2(uint64_t *address, size_t size) {
    NOTE;
    *address = (uint64_t)(uintptr_t)aligned_alloc(256, (size + 255) / 256 * 256);
    memset((void *)(uintptr_t)*address, 0xCD, size);
    allocated++;
    return 0;
}
CUresult cuMemFree_v2(uint64_t address) { NOTE; free((void *)(uintptr_t)address); allocated--; return 0; }
static CUresult copy(uint64_t to, uint64_t from, size_t size) {
    if (capturing) return 900;
    memcpy((void *)(uintptr_t)to, (const void *)(uintptr_t)from, size);
    return 0;
}
CUresult cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, void *stream) {
    NOTE;
    return copy(to, (uint64_t)(uintptr_t)from, size);
}
CUresult cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *stream) {
    NOTE;
    return copy((uint64_t)(uintptr_t)to, from, size);
}
CUresult cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t size, void *stream) { NOTE; return copy(to, from, size); }
CUresult cuStreamCreate(void **stream, unsigned flags) { HANDLE(stream); }
CUresult cuStreamDestroy_v2(void *stream) { NOTE; free(stream); return 0; }
CUresult cuModuleUnload(void *module) { NOTE; free(module); return 0; }
CUresult cuStreamSynchronize(void *stream) { NOTE; return capturing ? 900 : 0; }
CUresult cuStreamWaitEvent(void *stream, void *event, unsigned flags) { NOTE; return 0; }

/* The number of pointers is not told to the driver; a real one knows it from the machine code. */
static int count_of(const char *name) {
    for (const char *const *entry = parameter_counts; entry && *entry; entry++) {
        size_t length = strlen(name);
        if (!strncmp(*entry, name, length) && (*entry)[length] == '=') return atoi(*entry + length + 1);
    }
    return 0;
}
void fake_set_parameter_counts(const char *const *entries) { parameter_counts = entries; }

CUresult cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, void *stream, void **parameters, void **extra) {
    NOTE;
    if (!capturing || extra || capturing->count == 512) return 1;
    Launch *launch = &capturing->launches[capturing->count++];
    *launch = (Launch){.name = function, .sizes = {gx, gy, gz, bx, by, bz}, .shared = shared, .count = count_of(function)};
    for (int i = 0; i < launch->count; i++) launch->values[i] = *(uint64_t *)parameters[i];
    return 0;
}
CUresult cuStreamBeginCapture_v2(void *stream, int mode) { NOTE; capturing = calloc(1, sizeof(Graph)); return mode != 1; }
CUresult cuStreamEndCapture(void *stream, void **graph) { NOTE; *graph = capturing; capturing = NULL; return 0; }
CUresult cuGraphInstantiateWithFlags(void **executable, void *graph, uint64_t flags) {
    NOTE;
    *executable = malloc(sizeof(Graph));
    memcpy(*executable, graph, sizeof(Graph));
    return 0;
}
CUresult cuGraphLaunch(void *executable, void *stream) {
    NOTE;
    Graph *graph = executable;
    for (int i = 0; i < graph->count && launcher; i++) {
        Launch *launch = &graph->launches[i];
        launcher(launch->name, launch->sizes, launch->shared, launch->values, launch->count);
    }
    return 0;
}
CUresult cuGraphDestroy(void *graph) { NOTE; free(graph); return 0; }
CUresult cuGraphExecDestroy(void *executable) { NOTE; free(executable); return 0; }
CUresult cuEventCreate(void **event, unsigned flags) { HANDLE(event); }
CUresult cuEventRecord(void *event, void *stream) { NOTE; return 0; }
CUresult cuEventSynchronize(void *event) { NOTE; return 0; }
CUresult cuEventElapsedTime(float *milliseconds, void *start, void *stop) { NOTE; *milliseconds = 0.25f; return 0; }
CUresult cuEventDestroy_v2(void *event) { NOTE; free(event); return 0; }
