#ifndef CCURL_SHIM_H
#define CCURL_SHIM_H

#include <curl/curl.h>

/* Swift cannot call variadic functions: one wrapper for each type of argument. Handles are void *, which they are
   unless CURL_STRICTER is defined. */

/* Also the type of read and header functions. */
typedef size_t (*ccurl_data_function)(char *bytes, size_t size, size_t count, void *context);
typedef int (*ccurl_seek_function)(void *context, curl_off_t offset, int origin);

static inline CURLcode ccurl_set_long(void *easy, CURLoption option, long value) {
  return curl_easy_setopt((CURL *)easy, option, value);
}
static inline CURLcode ccurl_set_offset(void *easy, CURLoption option, curl_off_t value) {
  return curl_easy_setopt((CURL *)easy, option, value);
}
/* curl copies the string. */
static inline CURLcode ccurl_set_string(void *easy, CURLoption option, const char *value) {
  return curl_easy_setopt((CURL *)easy, option, value);
}
/* curl does not copy the list: it has to outlive the transfer. */
static inline CURLcode ccurl_set_list(void *easy, CURLoption option, struct curl_slist *value) {
  return curl_easy_setopt((CURL *)easy, option, value);
}
static inline CURLcode ccurl_set_pointer(void *easy, CURLoption option, void *value) {
  return curl_easy_setopt((CURL *)easy, option, value);
}
static inline CURLcode ccurl_set_data_function(void *easy, CURLoption option, ccurl_data_function value) {
  return curl_easy_setopt((CURL *)easy, option, value);
}
static inline CURLcode ccurl_set_seek_function(void *easy, ccurl_seek_function value) {
  return curl_easy_setopt((CURL *)easy, CURLOPT_SEEKFUNCTION, value);
}
/* http and https, for the request and for whatever it might be redirected to. */
static inline CURLcode ccurl_allow_http_only(void *easy) {
#if LIBCURL_VERSION_NUM >= 0x075500
  CURLcode code = curl_easy_setopt((CURL *)easy, CURLOPT_PROTOCOLS_STR, "http,https");
  return code ? code : curl_easy_setopt((CURL *)easy, CURLOPT_REDIR_PROTOCOLS_STR, "http,https");
#else
  CURLcode code = curl_easy_setopt((CURL *)easy, CURLOPT_PROTOCOLS, (long)(CURLPROTO_HTTP | CURLPROTO_HTTPS));
  return code ? code : curl_easy_setopt((CURL *)easy, CURLOPT_REDIR_PROTOCOLS, (long)(CURLPROTO_HTTP | CURLPROTO_HTTPS));
#endif
}

/* 0 where curl has no answer. */
static inline long ccurl_get_long(void *easy, CURLINFO info) {
  long value = 0;
  return curl_easy_getinfo((CURL *)easy, info, &value) == CURLE_OK ? value : 0;
}
static inline curl_off_t ccurl_get_offset(void *easy, CURLINFO info) {
  curl_off_t value = 0;
  return curl_easy_getinfo((CURL *)easy, info, &value) == CURLE_OK ? value : 0;
}
/* NULL where curl has no answer; curl's own, valid until the handle is used again. */
static inline const char *ccurl_get_string(void *easy, CURLINFO info) {
  char *value = NULL;
  return curl_easy_getinfo((CURL *)easy, info, &value) == CURLE_OK ? value : NULL;
}

static inline CURLMcode ccurl_multi_set_long(void *multi, CURLMoption option, long value) {
  return curl_multi_setopt((CURLM *)multi, option, value);
}
static inline CURLcode ccurl_global_init(void) { return curl_global_init(CURL_GLOBAL_DEFAULT); }

#endif
