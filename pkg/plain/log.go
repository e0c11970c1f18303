package plain

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/go-logr/logr"
	"k8s.io/klog/v2"
)

// Logger returns a logger that writes to log, and each line of which is printable and bounded, whatever its values are:
// see Line. Only a Block has several lines. The lines with one message are bounded, too, whatever other programs and
// nodes do again and again: at most mostLines at once, and then linesPerMinute. With --v=2 and more, all are logged.
//
// By itself, klog writes a value that has a line break as it is, over several lines, and JSON with all of its characters
// but the control characters of ASCII.
//
// The commands of errors that have the method Command() string are another value of the line.
func Logger(log klog.Logger) klog.Logger {
	// The methods of sink are one more call between the caller and klog, which logs where the caller is.
	return log.WithSink(&sink{log.WithCallDepth(1).GetSink(), &budget{messages: map[string]*allowance{}}})
}

type sink struct {
	logr.LogSink
	budget *budget
}

var _ logr.CallDepthLogSink = (*sink)(nil)

// Enabled implements logr.LogSink. It is one more call, as the other methods are.
func (s *sink) Enabled(level int) bool { return s.LogSink.Enabled(level) }

// Info implements logr.LogSink.
func (s *sink) Info(level int, msg string, keysAndValues ...any) {
	msg = Line(msg)
	ok, warn := true, false
	if level == 0 {
		keysAndValues, ok, warn = s.budget.take(msg, keysAndValues)
	}
	if warn {
		s.LogSink.Info(level, tooMany, "message", msg, "perMinute", linesPerMinute)
	}
	if !ok {
		return
	}
	s.LogSink.Info(level, msg, values(keysAndValues)...)
}

// Error implements logr.LogSink.
func (s *sink) Error(err error, msg string, keysAndValues ...any) {
	msg = Line(msg)
	keysAndValues, ok, warn := s.budget.take(msg, keysAndValues)
	if warn {
		s.LogSink.Error(nil, tooMany, "message", msg, "perMinute", linesPerMinute)
	}
	if !ok {
		return
	}
	if all := commands(err); all != nil {
		keysAndValues = append(slices.Clone(keysAndValues), "command", Block(strings.Join(all, "\n")))
	}
	if err != nil {
		if text := Line(err.Error()); text != err.Error() {
			err = errors.New(text)
		}
	}
	s.LogSink.Error(err, msg, values(keysAndValues)...)
}

// commands returns the commands of an error and of the errors that it wraps.
func commands(err error) []string {
	switch err := err.(type) {
	case interface{ Command() string }:
		return []string{err.Command()}
	case interface{ Unwrap() error }:
		return commands(err.Unwrap())
	case interface{ Unwrap() []error }:
		var all []string
		for _, err := range err.Unwrap() {
			all = append(all, commands(err)...)
		}
		return all
	}
	return nil
}

// WithValues implements logr.LogSink.
func (s *sink) WithValues(keysAndValues ...any) logr.LogSink {
	return &sink{s.LogSink.WithValues(values(keysAndValues)...), s.budget}
}

// WithName implements logr.LogSink.
func (s *sink) WithName(name string) logr.LogSink { return &sink{s.LogSink.WithName(name), s.budget} }

// WithCallDepth implements logr.CallDepthLogSink.
func (s *sink) WithCallDepth(depth int) logr.LogSink {
	if inner, ok := s.LogSink.(logr.CallDepthLogSink); ok {
		return &sink{inner.WithCallDepth(depth), s.budget}
	}
	return s
}

// values returns the keys and values of a line, with values that can be shown.
func values(keysAndValues []any) []any {
	all := make([]any, len(keysAndValues))
	for i, v := range keysAndValues {
		all[i] = value(v)
	}
	return all
}

// value returns v as it is where klog shows v on a line of its own text, or else the text to show.
func value(v any) any {
	var text string
	switch v := v.(type) {
	case nil, bool, int, int8, int16, int32, int64, uint, uint8, uint16, uint32, uint64, float32, float64, Block:
		return v
	case string:
		return Line(v)
	case fmt.Stringer, error:
		text = fmt.Sprint(v)
	case []byte:
		if len(v) > Most {
			return Quote(v)
		}
		return v // klog quotes it
	default: // which klog writes as JSON
		b, err := json.Marshal(v)
		if err != nil {
			b = fmt.Appendf(nil, "%+v", v)
		}
		text = string(b)
	}
	if shown := Line(text); shown != text {
		return shown
	}
	return v
}
