/* A stand-in for the CUDA driver, for tests: memory is host memory, launches go to a callback. What is put on a stream is
   done when something waits for it and not before, so that a missing wait shows in the numbers; a broken rule of the API
   gives the driver's error and a line in `fake_violations`. Nothing of this is shipped. */
#include "state.h"

CUresult cuInit(unsigned flags) { ENTER; initialized = 1; return flags != 0; }
CUresult cuDriverGetVersion(int *version) { ENTER; *version = 13000; return 0; }
CUresult cuGetErrorString(CUresult status, const char **text) {
    *text = status == 2 ? "out of memory" : status == 700 ? "an illegal memory access was encountered" : "some failure";
    return 0;
}
CUresult cuDeviceGetCount(int *count) { ENTER; *count = devices; return 0; }
CUresult cuDeviceGet(int *device, int ordinal) { ENTER; *device = ordinal + DEVICE_HANDLE; return 0; }
CUresult cuDeviceGetName(char *name, int size, int device) { ENTER; snprintf(name, (size_t)size, "Test GPU"); return 0; }
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    ENTER;
    switch (attribute) {
    case 13: *value = 1700000; return 0;
    case 16: *value = 84; return 0;
    case 38: *value = 1 << 16; return 0;
    case 75: *value = capability / 10; return 0;
    case 76: *value = capability % 10; return 0;
    case 97: *value = shared_limit(); return 0;
    default: BROKEN(1, "unknown attribute");
    }
}

/* --- contexts */

CUresult cuDevicePrimaryCtxRetain(Object **context, int device) {
    ENTER;
    if (!initialized) BROKEN(3, "used before cuInit");
    Object *found = contexts[device - DEVICE_HANDLE];
    if (!found || !found->alive) {
        found = contexts[device - DEVICE_HANDLE] = make(CONTEXT);
        found->context = found;
        legacy[device - DEVICE_HANDLE] = make(STREAM);
        legacy[device - DEVICE_HANDLE]->context = found;
        legacy[device - DEVICE_HANDLE]->flags = 0;
        live--; /* The default stream belongs to the context. */
    }
    found->count++;
    *context = found;
    return 0;
}
CUresult cuDevicePrimaryCtxRelease_v2(int device) {
    ENTER;
    Object *context = contexts[device - DEVICE_HANDLE];
    if (!context || !context->alive || context->count < 1) BROKEN(201, "a context released that nobody holds");
    if (--context->count) return 0;
    end(context);
    if (live_in(context)) BROKEN(0, "a context ends that still holds %d things", live_in(context));
    return 0;
}
CUresult cuCtxGetCurrent(Object **context) { ENTER; *context = current; return 0; }
CUresult cuCtxSetCurrent(Object *context) {
    ENTER;
    if (context && (context->kind != CONTEXT || !context->alive)) BROKEN(201, "not a live context");
    current = context;
    return 0;
}
CUresult cuThreadExchangeStreamCaptureMode(int *mode) {
    ENTER;
    int before = thread_mode;
    if (*mode < 0 || *mode > 2) BROKEN(1, "mode %d", *mode);
    thread_mode = *mode, *mode = before;
    return 0;
}

/* --- modules */

CUresult cuModuleLoadDataEx(Object **module, const char *image, unsigned count, int *options, void **values) {
    ENTER_CONTEXT;
    UNSAFE;
    if (!strncmp(image, "broken", 6)) {
        for (unsigned i = 0; i + 1 < count; i++) {
            if (options[i] == 5 && options[i + 1] == 6) {
                snprintf(values[i], (size_t)(uintptr_t)values[i + 1], "ptxas: line 3: unknown instruction");
            }
        }
        return 218;
    }
    *module = make(MODULE);
    return 0;
}
CUresult cuModuleUnload(Object *module) { ENTER_CONTEXT; UNSAFE; NEED(module, MODULE); return end(module); }
CUresult cuModuleGetFunction(Object **function, Object *module, const char *name) {
    ENTER_CONTEXT;
    NEED(module, MODULE);
    if (count_of(name) < 0) BROKEN(500, "no kernel %s", name);
    *function = make(FUNCTION);
    live--; /* Goes with its module. */
    (*function)->owner = module, (*function)->name = strdup(name), (*function)->flags = 48 * 1024;
    return 0;
}
CUresult cuFuncLoad(Object *function) { ENTER_CONTEXT; NEED(function, FUNCTION); return 0; }
CUresult cuFuncSetAttribute(Object *function, int attribute, int value) {
    ENTER_CONTEXT;
    NEED(function, FUNCTION);
    if (attribute != 8) BROKEN(1, "function attribute %d", attribute);
    if (value > shared_limit()) BROKEN(1, "%d bytes of shared memory", value);
    function->flags = value;
    return 0;
}

/* --- memory */

CUresult cuMemGetInfo_v2(size_t *available, size_t *total) {
    ENTER_CONTEXT;
    *available = memory_limit - memory_used, *total = memory_limit;
    return 0;
}
CUresult cuMemAlloc_v2(uint64_t *address, size_t size) {
    ENTER_CONTEXT;
    UNSAFE;
    if (!size) BROKEN(1, "an allocation of 0 bytes");
    if (memory_used + size > memory_limit) return 2;
    *address = allocate(size, DEVICE_MEMORY);
    return 0;
}
CUresult cuMemFree_v2(uint64_t address) {
    ENTER_CONTEXT;
    UNSAFE;
    finish_all();
    return release(address, DEVICE_MEMORY) ? 0 : broken(__func__, 1, "not an allocation");
}
CUresult cuMemHostAlloc(void **address, size_t size, unsigned flags) {
    ENTER_CONTEXT;
    UNSAFE;
    *address = (void *)(uintptr_t)allocate(size, HOST_MEMORY);
    return 0;
}
CUresult cuMemFreeHost(void *address) {
    ENTER_CONTEXT;
    UNSAFE;
    uint64_t number = (uint64_t)(uintptr_t)address;
    if (is_being_copied(number, size_at(number))) broken(__func__, 0, "page-locked memory freed while it is copied");
    return release(number, HOST_MEMORY) ? 0 : broken(__func__, 1, "not an allocation");
}
static CUresult copy(const char *name, Object *stream, uint64_t to, uint64_t from, size_t size, int kinds) {
    if ((kinds & 2) && !inside(to, size, DEVICE_MEMORY)) return broken(name, 1, "writes %zu bytes beyond memory", size);
    if ((kinds & 1) && !inside(from, size, DEVICE_MEMORY)) return broken(name, 1, "reads %zu bytes beyond memory", size);
    Operation operation = {.kind = COPY, .to = to, .from = from, .size = size};
    int is_pageable = (kinds == 2 && !inside(from, size, HOST_MEMORY)) || (kinds == 1 && !inside(to, size, HOST_MEMORY));
    if (is_pageable && stream->capturing) return broken(name, 900, "a copy of pageable memory is being recorded");
    if (is_pageable && kinds == 2) { /* Has been read when the call returns. */
        operation.snapshot = malloc(size);
        memcpy(operation.snapshot, (void *)(uintptr_t)from, size);
    }
    put(stream, operation);
    if (is_pageable && kinds == 1) finish(stream);
    return 0;
}
CUresult cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, Object *handle) {
    ENTER_STREAM(handle);
    return copy(__func__, stream, to, (uint64_t)(uintptr_t)from, size, 2);
}
CUresult cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, Object *handle) {
    ENTER_STREAM(handle);
    return copy(__func__, stream, (uint64_t)(uintptr_t)to, from, size, 1);
}
CUresult cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t size, Object *handle) {
    ENTER_STREAM(handle);
    return copy(__func__, stream, to, from, size, 3);
}
CUresult cuMemsetD8Async(uint64_t to, unsigned char value, size_t size, Object *handle) {
    ENTER_STREAM(handle);
    if (!inside(to, size, DEVICE_MEMORY)) BROKEN(1, "fills %zu bytes beyond memory", size);
    put(stream, (Operation){.kind = FILL, .to = to, .from = value, .size = size});
    return 0;
}

/* --- streams and events */

CUresult cuStreamCreate(Object **stream, unsigned flags) {
    ENTER_CONTEXT;
    *stream = make(STREAM);
    (*stream)->flags = (int)flags;
    return 0;
}
CUresult cuStreamDestroy_v2(Object *stream) { ENTER_CONTEXT; NEED(stream, STREAM); finish(stream); return end(stream); }
CUresult cuStreamSynchronize(Object *handle) {
    ENTER_STREAM(handle);
    UNSAFE;
    if (stream->capturing) BROKEN(900, "waits for a stream that is being recorded");
    finish(stream);
    return current->status;
}
CUresult cuStreamWaitEvent(Object *handle, Object *event, unsigned flags) {
    ENTER_STREAM(handle);
    NEED(event, EVENT);
    if (stream->capturing) BROKEN(905, "a recorded stream waits for an event outside of the recording");
    if (event->owner) put(stream, (Operation){.kind = WAIT, .object = event->owner, .size = event->position});
    return 0;
}
CUresult cuStreamIsCapturing(Object *handle, int *status) { ENTER_STREAM(handle); *status = stream->capturing != NULL; return 0; }
CUresult cuStreamBeginCapture_v2(Object *handle, int mode) {
    ENTER_STREAM(handle);
    if (!handle) BROKEN(900, "the default stream cannot be recorded");
    stream->capturing = make(GRAPH), stream->flags |= mode << 8, captures[mode]++;
    if (mode != 2) own_captures++;
    return 0;
}
CUresult cuStreamEndCapture(Object *handle, Object **graph) {
    ENTER_STREAM(handle);
    if (!stream->capturing) BROKEN(901, "ends a recording that was not begun");
    int mode = stream->flags >> 8;
    *graph = stream->capturing, stream->capturing = NULL, stream->flags &= 255, captures[mode]--;
    if (mode != 2) own_captures--;
    return 0;
}
CUresult cuEventCreate(Object **event, unsigned flags) {
    ENTER_CONTEXT;
    *event = make(EVENT);
    (*event)->flags = (int)flags;
    return 0;
}
CUresult cuEventRecord(Object *event, Object *handle) {
    ENTER_STREAM(handle);
    NEED(event, EVENT);
    if (stream->capturing) BROKEN(900, "an event of ours is recorded into somebody's graph");
    put(stream, (Operation){.kind = RECORD, .object = event});
    event->owner = stream, event->position = stream->length;
    return 0;
}
CUresult cuEventQuery(Object *event) {
    ENTER_CONTEXT;
    UNSAFE;
    NEED(event, EVENT);
    return has_happened(event) ? 0 : 600;
}
CUresult cuEventSynchronize(Object *event) {
    ENTER_CONTEXT;
    NEED(event, EVENT);
    if (event->owner) run_to(event->owner, event->position);
    return current->status;
}
CUresult cuEventElapsedTime(float *milliseconds, Object *start, Object *stop) {
    ENTER_CONTEXT;
    NEED(start, EVENT);
    NEED(stop, EVENT);
    if ((start->flags | stop->flags) & 2) BROKEN(400, "the time of an event without one");
    if (!start->owner || !stop->owner) BROKEN(400, "the time of an event that was not recorded");
    if (!has_happened(start) || !has_happened(stop)) return 600;
    *milliseconds = (float)(stop->time - start->time);
    return 0;
}
CUresult cuEventDestroy_v2(Object *event) { ENTER_CONTEXT; NEED(event, EVENT); return end(event); }

/* --- launches and graphs */

static CUresult kernel(const char *name, Operation *operation, Object *function, const unsigned *sizes, unsigned shared,
                       void **parameters) {
    if (!function || function->kind != FUNCTION || !function->owner->alive) return broken(name, 400, "not a kernel");
    if (shared > (unsigned)function->flags) return broken(name, 1, "%u bytes of shared memory are not allowed", shared);
    unsigned threads = sizes[3] * sizes[4] * sizes[5];
    if (!threads || threads > 1024 || sizes[5] > 64) return broken(name, 1, "a block of %u threads", threads);
    if (!sizes[0] || !sizes[1] || !sizes[2] || sizes[1] > 65535 || sizes[2] > 65535) return broken(name, 1, "the grid");
    *operation = (Operation){.kind = KERNEL, .object = function, .shared = shared, .count = count_of(function->name)};
    memcpy(operation->sizes, sizes, sizeof operation->sizes);
    for (int i = 0; i < operation->count; i++) operation->values[i] = *(uint64_t *)parameters[i];
    return 0;
}
CUresult cuLaunchKernel(Object *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, Object *handle, void **parameters, void **extra) {
    ENTER_STREAM(handle);
    Operation operation;
    CUresult status = kernel(__func__, &operation, function, (unsigned[]){gx, gy, gz, bx, by, bz}, shared, parameters);
    if (!status) put(stream, operation);
    return status;
}
CUresult cuGraphCreate(Object **graph, unsigned flags) { ENTER_CONTEXT; *graph = make(GRAPH); return flags != 0; }
CUresult cuGraphAddKernelNode_v2(Object **node, Object *graph, Object **after, size_t count, const KernelNode *values) {
    ENTER_CONTEXT;
    NEED(graph, GRAPH);
    if (graph->length && (count != 1 || after[0]->owner != graph || after[0]->position + 1 != graph->length)) {
        BROKEN(0, "a launch runs beside another one");
    }
    Operation operation;
    CUresult status = kernel(__func__, &operation, values->function, values->sizes, values->shared, values->parameters);
    if (status) return status;
    *node = make(NODE);
    live--; /* Goes with its graph. */
    (*node)->owner = graph, (*node)->position = graph->length;
    append(graph, operation);
    return 0;
}
CUresult cuGraphInstantiateWithFlags(Object **executable, Object *graph, uint64_t flags) {
    ENTER_CONTEXT;
    UNSAFE;
    NEED(graph, GRAPH);
    *executable = make(EXECUTABLE);
    (*executable)->owner = graph;
    for (size_t i = 0; i < graph->length; i++) append(*executable, graph->operations[i]);
    return 0;
}
CUresult cuGraphExecKernelNodeSetParams_v2(Object *executable, Object *node, const KernelNode *values) {
    ENTER_CONTEXT;
    NEED(executable, EXECUTABLE);
    if (!node || node->kind != NODE || !node->owner->alive || node->owner != executable->owner) {
        BROKEN(1, "not a node of the graph that this was made from");
    }
    return kernel(__func__, &executable->operations[node->position], values->function, values->sizes, values->shared,
                  values->parameters);
}
CUresult cuGraphUpload(Object *executable, Object *handle) { ENTER_STREAM(handle); NEED(executable, EXECUTABLE); return 0; }
CUresult cuGraphLaunch(Object *executable, Object *handle) {
    ENTER_STREAM(handle);
    NEED(executable, EXECUTABLE);
    if (stream->capturing) BROKEN(900, "a graph launched on a stream that is being recorded");
    for (size_t i = 0; i < executable->length && !is_quiet; i++) put(stream, executable->operations[i]);
    return 0;
}
CUresult cuGraphDestroy(Object *graph) { ENTER_CONTEXT; NEED(graph, GRAPH); return end(graph); }
CUresult cuGraphExecDestroy(Object *executable) { ENTER_CONTEXT; UNSAFE; NEED(executable, EXECUTABLE); return end(executable); }
