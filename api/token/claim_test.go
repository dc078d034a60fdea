package token

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

const manyClaims = `{"iss":"https://km.example.com","nothing":null,"Scope":"not this","scp":["a","b c"],"one":"a b","none":[],
	"id":12,"minus":-3,"half":1.5,"exponent":1e2,"big":2147483648,"yes":true,"no":false,"empty":"",
	"escaped":"\u0061\ud83d\ude00","broken":"\ud83d","raw":{"b": [1, {"c":null}], "a":"x"},
	"list":[{"name":"first"}, {}],"mixed":[{"name":"first"},null],"texts":["a",1],"application":{"id":7,"Id":8,"inner":{"deep":true}}}`

// claimsIn is a token with these claims, as it is after its verification.
func claimsIn(t testing.TB, payload string) *Token {
	t.Helper()
	v := verifier(t, Issuer{Iss: iss, Keys: keySet(t, public("k1", "ES256", &ecTestKey().PublicKey))})
	got, err := v.Verify(t.Context(), sign(t, "ES256", ecTestKey(), map[string]any{"kid": "k1"}, payload))
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestClaim(t *testing.T) {
	t.Parallel()
	tok := claimsIn(t, manyClaims)
	for name, want := range map[string]string{
		"raw": `{"b": [1, {"c":null}], "a":"x"}`, "scp": `["a","b c"]`, "id": "12", "no": "false", "empty": `""`, "escaped": `"\u0061\ud83d\ude00"`,
		"Scope": `"not this"`, "scope": "", "SCP": "", "nothing": "", "b": "", "": "",
	} {
		got, ok := tok.Claim(name)
		if string(got) != want || ok != (want != "") || ok != tok.Has(name) || ok != tok.Claims().Has(name) {
			t.Errorf("Claim(%q) = %s, %t, Has %t, want %s", name, got, ok, tok.Has(name), want)
		}
	}
	got, _ := tok.Claim("raw")
	for i := range got {
		got[i] = 'x' // the caller's
	}
	if again, _ := tok.Claim("raw"); !json.Valid(again) {
		t.Errorf("the token was changed: %s", again)
	}
}

// What a claim is read as, and that nothing else is taken for it.
func TestObject(t *testing.T) {
	t.Parallel()
	o := claimsIn(t, manyClaims).Claims()
	wrong := errors.New("wrong")
	names := func(list []Object, err error) (any, error) {
		if list == nil {
			return nil, err
		}
		texts := []string{}
		for _, o := range list {
			s, err := o.Text("name")
			texts = append(texts, s)
			if err != nil {
				return nil, err
			}
		}
		return texts, err
	}
	type reader = func(name string) (any, error)
	text := func(name string) (any, error) { return o.Text(name) }
	texts := func(name string) (any, error) { return o.Texts(name) }
	int32s := func(name string) (any, error) { return o.Int32(name) }
	bools := func(name string) (any, error) { return o.Bool(name) }
	objects := func(name string) (any, error) { return names(o.Objects(name)) }
	id := func(name string) (any, error) {
		inner, err := o.Object(name)
		if err != nil {
			return nil, err
		}
		return inner.Int32("id")
	}
	for _, tt := range []struct {
		what string
		read reader
		name string
		want any
	}{
		{"Text", text, "one", "a b"},
		{"Text", text, "escaped", "a😀"},
		{"Text", text, "empty", ""},
		{"Text", text, "nothing", ""},
		{"Text", text, "absent", ""},
		{"Text", text, "id", wrong},
		{"Text", text, "scp", wrong},
		{"Text", text, "broken", wrong},
		{"Texts", texts, "one", []string{"a b"}},
		{"Texts", texts, "scp", []string{"a", "b c"}},
		{"Texts", texts, "none", []string{}},
		{"Texts", texts, "nothing", []string(nil)},
		{"Texts", texts, "texts", wrong},
		{"Texts", texts, "raw", wrong},
		{"Texts", texts, "broken", wrong},
		{"Int32", int32s, "id", int32(12)},
		{"Int32", int32s, "minus", int32(-3)},
		{"Int32", int32s, "absent", int32(0)},
		{"Int32", int32s, "half", wrong},
		{"Int32", int32s, "exponent", wrong},
		{"Int32", int32s, "big", wrong},
		{"Int32", int32s, "one", wrong},
		{"Bool", bools, "yes", true},
		{"Bool", bools, "no", false},
		{"Bool", bools, "nothing", false},
		{"Bool", bools, "id", wrong},
		{"Bool", bools, "empty", wrong},
		{"Object", id, "application", int32(7)},
		{"Object", id, "nothing", int32(0)},
		{"Object", id, "list", wrong},
		{"Object", id, "one", wrong},
		{"Objects", objects, "list", []string{"first", ""}},
		{"Objects", objects, "none", []string{}},
		{"Objects", objects, "nothing", nil},
		{"Objects", objects, "mixed", wrong},
		{"Objects", objects, "raw", wrong},
		{"Objects", objects, "one", wrong},
	} {
		got, err := tt.read(tt.name)
		if tt.want == wrong {
			if !errors.Is(err, ErrClaims) {
				t.Errorf("%s(%q) = %v, %v, want %v", tt.what, tt.name, got, err, ErrClaims)
			}
			continue
		}
		if diff := cmp.Diff(tt.want, got, cmpopts.EquateErrors()); diff != "" || err != nil {
			t.Errorf("%s(%q), %v (-want +got):\n%s", tt.what, tt.name, err, diff)
		}
	}
	inner, err := o.Object("application")
	if err != nil {
		t.Fatal(err)
	}
	if deep, err := inner.Object("inner"); err != nil || !deep.Has("deep") || deep.Has("Deep") || (Object{}).Has("") {
		t.Errorf("inner object %+v, %v", deep, err)
	}
}

// FuzzObject reads every member as everything, and compares with encoding/json.
func FuzzObject(f *testing.F) {
	for _, s := range []string{manyClaims, `{"a":{"b":{"a":1}},"c":[{"a":[{}]},{"A":-1}],"d":[[]],"e":[1],"f":-0,"g":[ { } , {"x" : [ ] } ] }`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		members, err := parseObject(b)
		if err != nil {
			return
		}
		compareObject(t, Object{members}, b)
	})
}

func compareObject(t *testing.T, o Object, b []byte) {
	t.Helper()
	var want map[string]json.RawMessage
	if err := json.Unmarshal(b, &want); err != nil {
		t.Fatal(err)
	}
	if len(o.members) != len(want) {
		t.Fatalf("%d members, encoding/json reads %d", len(o.members), len(want))
	}
	for name, value := range want {
		if o.Has(name) != (string(value) != "null") {
			t.Fatalf("Has(%q) = %t of %s", name, o.Has(name), value)
		}
		if !o.Has(name) {
			continue
		}
		inner, err := o.Object(name)
		if (err == nil) != (value[0] == '{') {
			t.Fatalf("Object of %s: %v", value, err)
		} else if err == nil {
			compareObject(t, inner, value)
		}
		var wantList []json.RawMessage
		isList := json.Unmarshal(value, &wantList) == nil
		for _, item := range wantList {
			isList = isList && item[0] == '{'
		}
		list, err := o.Objects(name)
		if (err == nil) != isList || err == nil && len(list) != len(wantList) {
			t.Fatalf("Objects of %s: %d, %v", value, len(list), err)
		}
		for i := range list {
			compareObject(t, list[i], wantList[i])
		}
		var wantNumber int32
		isNumber := json.Unmarshal(value, &wantNumber) == nil
		if n, err := o.Int32(name); (err == nil) != isNumber || n != wantNumber {
			t.Fatalf("Int32 of %s: %d, %v", value, n, err)
		}
		var wantBool bool
		isBool := json.Unmarshal(value, &wantBool) == nil
		if b, err := o.Bool(name); (err == nil) != isBool || b != wantBool {
			t.Fatalf("Bool of %s: %t, %v", value, b, err)
		}
		var wantTexts []*string
		isText := json.Unmarshal([]byte("["+string(value)+"]"), &wantTexts) == nil || json.Unmarshal(value, &wantTexts) == nil
		for _, s := range wantTexts {
			isText = isText && s != nil
		}
		if _, err := o.Texts(name); err == nil && !isText {
			t.Fatalf("Texts of %s has no error", value)
		}
	}
}
