package pagetest

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// Keys returns a table of the keys of a JSON object that is parsed into a struct, made from the source of the package
// under test. Each field is a row; fields that are declared together share a row. The comment of the field is the
// meaning of the key. The default is the field's value in defaults, or the text of a tag:
//
//	// MTU of the network between the nodes
//	MTU int `default:"the uplink's"`
func Keys(t *testing.T, defaults any) string {
	t.Helper()
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	table, err := keys(files, defaults)
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func keys(files []string, defaults any) (string, error) {
	values := reflect.ValueOf(defaults)
	declared, err := find(files, values.Type().Name())
	if err != nil {
		return "", err
	}
	var table strings.Builder
	table.WriteString("| key | default | meaning |\n| --- | --- | --- |\n")
	for _, d := range declared.Fields.List {
		var names, shown []string
		for _, n := range d.Names {
			field, _ := values.Type().FieldByName(n.Name)
			value := values.FieldByIndex(field.Index)
			if _, words := field.Tag.Lookup("default"); words && !value.IsZero() {
				return "", fmt.Errorf("%s has two defaults, %v and the default of its tag", n.Name, value)
			}
			name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
			names = append(names, code(cmp.Or(name, n.Name)))
			shown = append(shown, show(field, value))
		}
		meaning := strings.Join(strings.Fields(cmp.Or(d.Doc.Text(), d.Comment.Text())), " ")
		if meaning == "" {
			return "", fmt.Errorf("%s has no comment that says what it means", strings.Join(names, ", "))
		}
		meaning = strings.ReplaceAll(meaning, "|", `\|`) // a bar would end the cell
		fmt.Fprintf(&table, "| %s | %s | %s |\n",
			strings.Join(names, ", "), strings.Join(slices.Compact(shown), ", "), meaning)
	}
	return table.String(), nil
}

// find returns the declaration of a struct.
func find(files []string, name string) (*ast.StructType, error) {
	for _, file := range files {
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments)
		if err != nil {
			return nil, err
		}
		for n := range ast.Preorder(parsed) {
			if spec, ok := n.(*ast.TypeSpec); ok && spec.Name.Name == name {
				if s, ok := spec.Type.(*ast.StructType); ok {
					return s, nil
				}
			}
		}
	}
	return nil, errors.New("no file here declares a struct " + name)
}

// show returns the text of a default in a table.
func show(f reflect.StructField, value reflect.Value) string {
	words, ok := f.Tag.Lookup("default")
	switch {
	case ok && f.Type == reflect.TypeFor[json.RawMessage]():
		return code(words)
	case ok:
		return words
	case value.Kind() != reflect.Bool && value.Kind() != reflect.Int && value.IsZero():
		return "none"
	case value.Kind() == reflect.String:
		return code(value.String())
	}
	return fmt.Sprint(value)
}

func code(text string) string { return "`" + text + "`" }
