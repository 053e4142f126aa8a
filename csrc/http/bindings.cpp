// pyserve._http: plain heads of requests (head.h) as Python objects. Without torch, so that it costs a process nothing.
//
// Written against Python's own C API: a request makes one of these objects and asks it three or four things, each of
// which would cost as much again to go through a binding library.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <cstring>
#include <string_view>

#include "http/head.h"

namespace {

using pyserve::HeadField;
using pyserve::PlainHead;
using pyserve::Span;

std::array<PyObject*, pyserve::plain_methods.size()> method_names;
PyObject* no_text;

// Text is made of the bytes when it is asked for; what was made is kept.
struct Head {
    PyObject_VAR_HEAD;
    PyObject* bytes;
    PyObject* method;
    PyObject* path;
    PyObject* query;
    PyObject* id;
    PyObject* expect;
    PyObject* headers;  // nullptr until somebody asks
    PyObject* text;     // the same
    PyObject* length;
    // True or False. Objects like all others, since that is the kind of attribute that Python reads quickest.
    PyObject* is_http11;
    PyObject* keep_alive;
    PyObject* chunked;
    PyObject* has_timing;
    PyObject* is_simple;
    HeadField fields[1];  // Py_SIZE of them

    std::string_view view() const { return {PyBytes_AS_STRING(bytes), static_cast<size_t>(PyBytes_GET_SIZE(bytes))}; }
    size_t count() const { return static_cast<size_t>(Py_SIZE(this)); }
};

PyTypeObject* head_type;

// What is plain is ASCII.
PyObject* text_of(std::string_view part) {
    PyObject* text = PyUnicode_New(static_cast<Py_ssize_t>(part.size()), 127);
    if (text != nullptr && !part.empty()) std::memcpy(PyUnicode_1BYTE_DATA(text), part.data(), part.size());
    return text;
}

void head_dealloc(PyObject* self) {
    Head* head = reinterpret_cast<Head*>(self);
    Py_XDECREF(head->bytes);
    Py_XDECREF(head->method);
    Py_XDECREF(head->path);
    Py_XDECREF(head->query);
    Py_XDECREF(head->id);
    Py_XDECREF(head->expect);
    Py_XDECREF(head->headers);
    Py_XDECREF(head->text);
    Py_XDECREF(head->length);
    Py_XDECREF(head->is_http11);
    Py_XDECREF(head->keep_alive);
    Py_XDECREF(head->chunked);
    Py_XDECREF(head->has_timing);
    Py_XDECREF(head->is_simple);
    PyTypeObject* type = Py_TYPE(self);
    PyObject_Free(self);
    Py_DECREF(type);
}

PyObject* head_find(PyObject* self, PyObject* name) {
    const Head* head = reinterpret_cast<Head*>(self);
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(name, &size);
    if (text == nullptr) return nullptr;
    const std::string_view bytes = head->view();
    const HeadField* field = pyserve::find_field(bytes, head->fields, head->count(), {text, static_cast<size_t>(size)});
    if (field == nullptr) Py_RETURN_NONE;
    return text_of(field->value.of(bytes));
}

PyObject* head_headers(PyObject* self, void*) {
    Head* head = reinterpret_cast<Head*>(self);
    if (head->headers == nullptr) {
        const std::string_view bytes = head->view();
        PyObject* list = PyList_New(Py_SIZE(self));
        if (list == nullptr) return nullptr;
        for (size_t at = 0; at < head->count(); ++at) {
            PyObject* name = text_of(head->fields[at].name.of(bytes));
            PyObject* value = name != nullptr ? text_of(head->fields[at].value.of(bytes)) : nullptr;
            PyObject* pair = value != nullptr ? PyTuple_Pack(2, name, value) : nullptr;
            Py_XDECREF(name);
            Py_XDECREF(value);
            if (pair == nullptr) {
                Py_DECREF(list);
                return nullptr;
            }
            PyList_SET_ITEM(list, static_cast<Py_ssize_t>(at), pair);
        }
        head->headers = list;
    }
    return Py_NewRef(head->headers);
}

PyObject* head_text(PyObject* self, void*) {
    Head* head = reinterpret_cast<Head*>(self);
    if (head->text == nullptr) {
        const std::string_view bytes = head->view();
        size_t size = 0;
        for (size_t at = 0; at < head->count(); ++at) {
            size += size_t{head->fields[at].name.size} + head->fields[at].value.size + 2;
        }
        PyObject* text = PyUnicode_New(static_cast<Py_ssize_t>(size > 0 ? size - 1 : 0), 127);
        if (text == nullptr) return nullptr;
        auto* to = PyUnicode_1BYTE_DATA(text);
        for (size_t at = 0; at < head->count(); ++at) {
            for (const Span& part : {head->fields[at].name, head->fields[at].value}) {
                if (to != PyUnicode_1BYTE_DATA(text)) *to++ = '\n';
                std::memcpy(to, bytes.data() + part.begin, part.size);
                to += part.size;
            }
        }
        head->text = text;
    }
    return Py_NewRef(head->text);
}

PyMethodDef head_methods[] = {
    {"find", head_find, METH_O, "The value of the last header of that name, which is in lower case; None without one."},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef head_properties[] = {
    {"headers", head_headers, nullptr, "Names and values in order.", nullptr},
    {"text", head_text, nullptr, "The same joined by newlines.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyMemberDef head_members[] = {
    {"bytes", T_OBJECT_EX, offsetof(Head, bytes), READONLY, nullptr},
    {"method", T_OBJECT_EX, offsetof(Head, method), READONLY, nullptr},
    {"path", T_OBJECT_EX, offsetof(Head, path), READONLY, nullptr},
    {"query", T_OBJECT_EX, offsetof(Head, query), READONLY, nullptr},
    {"id", T_OBJECT_EX, offsetof(Head, id), READONLY, nullptr},
    {"expect", T_OBJECT_EX, offsetof(Head, expect), READONLY, nullptr},
    {"length", T_OBJECT_EX, offsetof(Head, length), READONLY, nullptr},
    {"is_http11", T_OBJECT_EX, offsetof(Head, is_http11), READONLY, nullptr},
    {"keep_alive", T_OBJECT_EX, offsetof(Head, keep_alive), READONLY, nullptr},
    {"chunked", T_OBJECT_EX, offsetof(Head, chunked), READONLY, nullptr},
    {"has_timing", T_OBJECT_EX, offsetof(Head, has_timing), READONLY, nullptr},
    {"is_simple", T_OBJECT_EX, offsetof(Head, is_simple), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyType_Slot head_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(head_dealloc)},
    {Py_tp_methods, head_methods},
    {Py_tp_getset, head_properties},
    {Py_tp_members, head_members},
    {Py_tp_doc, const_cast<char*>("One plain head; as pyserve.http1.head.RequestHead.")},
    {0, nullptr},
};

PyType_Spec head_spec = {
    "pyserve._http.Head", offsetof(Head, fields),
    sizeof(HeadField),    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    head_slots,
};

PyObject* make_head(PyObject* bytes, const PlainHead& found, bool takes_ids) {
    Head* head = PyObject_NewVar(Head, head_type, static_cast<Py_ssize_t>(found.count));
    if (head == nullptr) return nullptr;
    const std::string_view view{PyBytes_AS_STRING(bytes), static_cast<size_t>(PyBytes_GET_SIZE(bytes))};
    head->bytes = Py_NewRef(bytes);
    head->method = Py_NewRef(method_names[found.method]);
    head->expect = Py_NewRef(no_text);
    head->path = text_of(found.path.of(view));
    head->query = found.query.size > 0 ? text_of(found.query.of(view)) : Py_NewRef(no_text);
    head->id = takes_ids && found.id.size > 0 ? text_of(found.id.of(view)) : Py_NewRef(no_text);
    head->headers = head->text = nullptr;
    head->length = PyLong_FromUnsignedLongLong(found.length);
    head->is_http11 = PyBool_FromLong(found.is_http11);
    head->keep_alive = PyBool_FromLong(found.keep_alive);
    head->chunked = PyBool_FromLong(0);
    head->has_timing = PyBool_FromLong(found.has_timing);
    head->is_simple = PyBool_FromLong(1);
    std::memcpy(head->fields, found.fields.data(), found.count * sizeof(HeadField));
    if (head->path == nullptr || head->query == nullptr || head->id == nullptr || head->length == nullptr) {
        Py_DECREF(head);
        return nullptr;
    }
    return reinterpret_cast<PyObject*>(head);
}

PyObject* read_plain(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (count != 3 || !PyBytes_Check(arguments[0])) {
        PyErr_SetString(PyExc_TypeError, "read_plain takes bytes, the most header lines, and whether ids are taken");
        return nullptr;
    }
    const Py_ssize_t fields_max = PyLong_AsSsize_t(arguments[1]);
    if (fields_max < 0) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "the most header lines must not be negative");
        return nullptr;
    }
    const int takes_ids = PyObject_IsTrue(arguments[2]);
    if (takes_ids < 0) return nullptr;
    PyObject* bytes = arguments[0];
    const std::string_view view{PyBytes_AS_STRING(bytes), static_cast<size_t>(PyBytes_GET_SIZE(bytes))};
    PlainHead found;
    if (!pyserve::PlainHeadReader::read(view, static_cast<size_t>(fields_max), found)) Py_RETURN_NONE;
    return make_head(bytes, found, takes_ids != 0);
}

PyMethodDef module_methods[] = {
    {"read_plain", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(read_plain)), METH_FASTCALL,
     "The head that the bytes are, all of them; None if it is not plain."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "pyserve._http", nullptr, -1, module_methods, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__http() {
    no_text = PyUnicode_InternFromString("");
    if (no_text == nullptr) return nullptr;
    for (size_t at = 0; at < method_names.size(); ++at) {
        method_names[at] = PyUnicode_InternFromString(pyserve::plain_methods[at].data());
        if (method_names[at] == nullptr) return nullptr;
    }
    head_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&head_spec));
    if (head_type == nullptr) return nullptr;
    PyObject* module = PyModule_Create(&module_definition);
    if (module == nullptr) return nullptr;
    if (PyModule_AddObjectRef(module, "Head", reinterpret_cast<PyObject*>(head_type)) < 0) {
        Py_DECREF(module);
        return nullptr;
    }
    return module;
}
