package token

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// keyFile keeps the last good key set of a URL across restarts.
//
// It is one line, then the document as it was served:
//
//	rescind-keys 1 <fetched, Unix seconds> <SHA-256 of the URL> <SHA-256 of the above and the document>
//
// The URL is part of it because the keys of one server say nothing about tokens once another
// one is named, and hashed because it may have a secret. The checksum is against damage: a key
// with a flipped bit would pass, and make genuine tokens look forged.
type keyFile struct {
	path string
	url  string // hashed
	log  *slog.Logger

	next atomic.Pointer[keyDocument] // what save is to write

	mu        sync.Mutex // of save and discard
	failing   bool       // the last write failed
	discarded bool       // nothing is written any more
}

// keyDocument is a key set as it was served. It was asked for at that time.
type keyDocument struct {
	at   time.Time
	body []byte
}

func newKeyFile(path, url string, log *slog.Logger) *keyFile {
	return &keyFile{path: path, url: hexSum([]byte(url)), log: log}
}

func hexSum(b []byte) string { return fmt.Sprintf("%x", sha256.Sum256(b)) }

const (
	keyFileForm = "rescind-keys 1 %d %s"
	// maxKeyFileBytes is a document and its line, of which the hashes are most.
	maxKeyFileBytes = maxKeySetBytes + 256
	// maxAhead is how far a file may have been written ahead of our clock. Past that its
	// age cannot be told, and it could be used for ever.
	maxAhead = 2 * time.Minute
)

func encodeKeyFile(d keyDocument, urlSum string) []byte {
	about := fmt.Sprintf(keyFileForm, d.at.Unix(), urlSum)
	sum := hexSum(append([]byte(about), d.body...))
	return fmt.Appendf(nil, "%s %s\n%s", about, sum, d.body)
}

// parseKeyFile is the reverse of encodeKeyFile. Its error says that the file is damaged.
func parseKeyFile(b []byte) (d keyDocument, urlSum string, err error) {
	line, body, ok := bytes.Cut(b, []byte("\n"))
	if !ok {
		return d, "", errors.New("it has no first line")
	}
	var seconds int64
	if _, err := fmt.Sscanf(string(line), keyFileForm, &seconds, &urlSum); err != nil {
		return d, "", errors.New("its first line is not of this version")
	}
	d = keyDocument{time.Unix(seconds, 0), body}
	if !bytes.Equal(encodeKeyFile(d, urlSum), b) {
		return d, "", errors.New("its checksum is wrong")
	}
	return d, urlSum, nil
}

// read returns the keys in the file and when they were fetched, nil if there are none that can
// be used. What is damaged is set aside. Nothing that is wrong with the file is a reason not to
// start: the keys can be fetched.
func (f *keyFile) read(now time.Time) (*StaticKeySet, time.Time) {
	b, err := f.readAll()
	if errors.Is(err, fs.ErrNotExist) {
		return nil, time.Time{}
	}
	if err != nil {
		f.log.Warn("kept signing keys cannot be read", "error", err)
		return nil, time.Time{}
	}
	keys, at, err := f.decode(b)
	if err != nil {
		aside := f.path + ".damaged"
		f.log.Warn("kept signing keys are damaged and are set aside", "file", f.path, "as", aside, "error",
			errors.Join(err, os.Rename(f.path, aside)))
		return nil, time.Time{}
	}
	age := now.Sub(at)
	switch {
	case keys == nil: // of another URL
		return nil, time.Time{}
	case age < -maxAhead:
		f.log.Warn("kept signing keys are not used: they were fetched in the future by this clock", "file", f.path, "fetched", at)
		return nil, time.Time{}
	}
	return keys, now.Add(-max(age, 0)) // with the monotonic clock of now, whatever becomes of the other
}

func (f *keyFile) readAll() ([]byte, error) {
	file, err := os.Open(f.path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return io.ReadAll(io.LimitReader(file, maxKeyFileBytes+1)) // a checksum of less than all is wrong
}

func (f *keyFile) decode(b []byte) (*StaticKeySet, time.Time, error) {
	d, urlSum, err := parseKeyFile(b)
	if err != nil || urlSum != f.url {
		return nil, time.Time{}, err
	}
	keys, err := ParseKeySet(d.body)
	return keys, d.at, err
}

// save writes what was fetched last. It is called when that is in use already: a disk that
// hangs holds nobody up.
func (f *keyFile) save() {
	f.mu.Lock()
	defer f.mu.Unlock()
	d := f.next.Swap(nil)
	if d == nil || f.discarded {
		return
	}
	err := f.write(encodeKeyFile(*d, f.url))
	if err != nil && !f.failing {
		f.log.Warn("signing keys cannot be kept for the next start", "error", err)
	}
	f.failing = err != nil
}

// discard removes the file, and what was set aside of it.
func (f *keyFile) discard() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.discarded = true
	for _, path := range []string{f.path, f.path + ".damaged"} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			f.log.Warn("kept signing keys that are trusted no longer cannot be removed: remove the file", "error", err)
		}
	}
}

func (f *keyFile) write(b []byte) (err error) {
	temporary := f.path + ".tmp"
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	file, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(b)
	if err == nil {
		err = file.Sync() // else a power failure could leave a file of this name with nothing in it
	}
	if err := errors.Join(err, file.Close()); err != nil {
		return err
	}
	return os.Rename(temporary, f.path)
}
