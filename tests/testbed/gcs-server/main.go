// Command gcs-server is fake-gcs-server with the part of Google Cloud Storage's XML API that it lacks.
//
// Clients built on the XML API (Rust's object_store is one) write objects by PUT and in multipart uploads; fake-gcs-server knows
// writing by the JSON API only (https://github.com/fsouza/fake-gcs-server/issues/331). This command translates those requests. Storage,
// generations, preconditions, listing and reading are fake-gcs-server's own.
package main

import (
	"bytes"
	"crypto/md5"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"sync"

	"github.com/fsouza/fake-gcs-server/fakestorage"
)

// upload is an unfinished multipart upload.
type upload struct {
	bucket, object string
	parts          map[int][]byte
}

// gateway adds the XML API's writes to the handler behind it.
type gateway struct {
	next    http.Handler
	host    string
	mutex   sync.Mutex
	uploads map[string]*upload
}

func main() {
	address := flag.String("listen", "127.0.0.1:4443", "address to listen on")
	flag.Parse()
	listener, err := net.Listen("tcp", *address)
	if err != nil {
		log.Fatal(err)
	}
	server, err := fakestorage.NewServerWithOptions(fakestorage.Options{NoListener: true, PublicHost: *address, ExternalURL: "http://" + *address})
	if err != nil {
		log.Fatal(err)
	}
	log.Fatal(http.Serve(listener, &gateway{next: server.HTTPHandler(), host: *address, uploads: map[string]*upload{}}))
}

func (g *gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	// fake-gcs-server finds its routes by host; requests through a proxy carry the proxy's.
	r.Host = g.host
	bucket, object, isObject := objectOf(r.URL)
	query := r.URL.Query()
	id := query.Get("uploadId")
	switch {
	case !isObject:
		g.next.ServeHTTP(w, r)
	case r.Method == http.MethodPost && query.Has("uploads"):
		g.start(w, bucket, object)
	case r.Method == http.MethodPut && id != "":
		g.part(w, r, id, query.Get("partNumber"))
	case r.Method == http.MethodPost && id != "":
		g.complete(w, r, id)
	case r.Method == http.MethodDelete && id != "":
		g.abort(w, id)
	case r.Method == http.MethodPut:
		content, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		g.write(w, bucket, object, content, r.Header, false)
	case (r.Method == http.MethodGet || r.Method == http.MethodHead) && r.Header.Get("If-Match") != "":
		g.read(w, r)
	default:
		g.next.ServeHTTP(w, r)
	}
}

// objectOf reports whether a request is for an object of the XML API, "/bucket/object".
func objectOf(address *url.URL) (bucket, object string, ok bool) {
	bucket, escaped, found := strings.Cut(strings.TrimPrefix(address.EscapedPath(), "/"), "/")
	switch bucket {
	case "storage", "upload", "download", "batch", "_internal":
		return "", "", false
	}
	object, err := url.PathUnescape(escaped)
	return bucket, object, found && object != "" && err == nil
}

// write stores an object by the JSON API, with the XML API's precondition and answer.
func (g *gateway) write(w http.ResponseWriter, bucket, object string, content []byte, header http.Header, multipart bool) {
	query := url.Values{"uploadType": {"media"}, "name": {object}}
	if generation := header.Get("X-Goog-If-Generation-Match"); generation != "" {
		query.Set("ifGenerationMatch", generation)
	}
	target := "/upload/storage/v1/b/" + url.PathEscape(bucket) + "/o?" + query.Encode()
	request := httptest.NewRequest(http.MethodPost, target, bytes.NewReader(content))
	request.Host = g.host
	request.Header.Set("Content-Type", header.Get("Content-Type"))
	answer := httptest.NewRecorder()
	g.next.ServeHTTP(answer, request)
	if answer.Code != http.StatusOK {
		fail(w, answer.Code, http.StatusText(answer.Code))
		return
	}
	var stored struct{ Etag, Generation string }
	if err := json.Unmarshal(answer.Body.Bytes(), &stored); err != nil {
		fail(w, http.StatusInternalServerError, err.Error())
		return
	}
	etag := strconv.Quote(strings.Trim(stored.Etag, `"`))
	w.Header().Set("ETag", etag)
	w.Header().Set("X-Goog-Generation", stored.Generation)
	if multipart {
		type CompleteMultipartUploadResult struct{ Bucket, Key, ETag string }
		answerXML(w, CompleteMultipartUploadResult{bucket, object, etag})
	}
}

// read answers a conditional read: fake-gcs-server does not know If-Match.
func (g *gateway) read(w http.ResponseWriter, r *http.Request) {
	look := r.Clone(r.Context())
	look.Method = http.MethodHead
	look.Header.Del("Range")
	answer := httptest.NewRecorder()
	g.next.ServeHTTP(answer, look)
	if answer.Code == http.StatusOK && answer.Header().Get("ETag") != r.Header.Get("If-Match") {
		fail(w, http.StatusPreconditionFailed, "the object has another ETag")
		return
	}
	g.next.ServeHTTP(w, r)
}

func (g *gateway) start(w http.ResponseWriter, bucket, object string) {
	name := make([]byte, 16)
	rand.Read(name)
	id := hex.EncodeToString(name)
	g.mutex.Lock()
	g.uploads[id] = &upload{bucket, object, map[int][]byte{}}
	g.mutex.Unlock()
	type InitiateMultipartUploadResult struct{ Bucket, Key, UploadId string }
	answerXML(w, InitiateMultipartUploadResult{bucket, object, id})
}

func (g *gateway) part(w http.ResponseWriter, r *http.Request, id, number string) {
	n, err := strconv.Atoi(number)
	if err != nil || n < 1 {
		fail(w, http.StatusBadRequest, "InvalidPartNumber")
		return
	}
	content, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	g.mutex.Lock()
	defer g.mutex.Unlock()
	upload, found := g.uploads[id]
	if !found {
		fail(w, http.StatusNotFound, "NoSuchUpload")
		return
	}
	upload.parts[n] = content
	w.Header().Set("ETag", etagOf(content))
}

func (g *gateway) complete(w http.ResponseWriter, r *http.Request, id string) {
	var wanted struct {
		Part []struct {
			PartNumber int
			ETag       string
		}
	}
	if err := xml.NewDecoder(r.Body).Decode(&wanted); err != nil {
		fail(w, http.StatusBadRequest, "MalformedXML")
		return
	}
	g.mutex.Lock()
	upload, found := g.uploads[id]
	var content []byte
	valid := found && len(wanted.Part) > 0
	for i, part := range wanted.Part {
		if !valid {
			break
		}
		stored, present := upload.parts[part.PartNumber]
		last := i == len(wanted.Part)-1
		inOrder := i == 0 || wanted.Part[i-1].PartNumber < part.PartNumber
		valid = present && inOrder && strings.Trim(part.ETag, `"`) == strings.Trim(etagOf(stored), `"`) && (last || len(stored) >= 5<<20)
		content = append(content, stored...)
	}
	if valid {
		delete(g.uploads, id)
	}
	g.mutex.Unlock()
	switch {
	case !found:
		fail(w, http.StatusNotFound, "NoSuchUpload")
	case !valid:
		fail(w, http.StatusBadRequest, "InvalidPart")
	default:
		g.write(w, upload.bucket, upload.object, content, r.Header, true)
	}
}

func (g *gateway) abort(w http.ResponseWriter, id string) {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	if _, found := g.uploads[id]; !found {
		fail(w, http.StatusNotFound, "NoSuchUpload")
		return
	}
	delete(g.uploads, id)
	w.WriteHeader(http.StatusNoContent)
}

func etagOf(content []byte) string {
	sum := md5.Sum(content)
	return strconv.Quote(hex.EncodeToString(sum[:]))
}

func answerXML(w http.ResponseWriter, document any) {
	w.Header().Set("Content-Type", "application/xml; charset=UTF-8")
	if err := xml.NewEncoder(w).Encode(document); err != nil {
		log.Print(err)
	}
}

func fail(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/xml; charset=UTF-8")
	w.WriteHeader(status)
	fmt.Fprintf(w, "<Error><Code>%s</Code><Message>%s</Message></Error>", code, http.StatusText(status))
}
